"""sparvar: pictures from text with visual autoregressive models, and sparse attention that needs no training.

    import sparvar
    pipe = sparvar.Pipeline.from_pretrained("models/emoji-v0")
    pipe("a red apple, 3d style", seed=7).images[0].save("apple.png")

    out = sparvar.attention(q, k, v, plan=sparvar.plans.csla(sparvar.schedule()))
"""

from . import plans
from ._engine import __version__
from .attention import AttentionState, attention
from .errors import Cancelled, Error, InputError, ResourceError, UsageError
from .lists import Bsr, KeyLists
from .pipeline import Pipeline, PipelineOutput, ScaleState, ScaleTiming, Seed, Timings
from .plans import Plan, schedule

__all__ = [
    "AttentionState",
    "Bsr",
    "Cancelled",
    "Error",
    "InputError",
    "KeyLists",
    "Pipeline",
    "PipelineOutput",
    "Plan",
    "ResourceError",
    "ScaleState",
    "ScaleTiming",
    "Seed",
    "Timings",
    "UsageError",
    "__version__",
    "attention",
    "plans",
    "schedule",
]
