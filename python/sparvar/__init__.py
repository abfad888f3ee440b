"""sparvar: pictures from text with visual autoregressive models, and sparse attention that needs no training.

`Pipeline.from_pretrained(folder)` draws; `convert(...)` makes such a folder of upstream's checkpoints;
`attention(q, k, v, plan=...)` runs the kernels on arrays of your own model, `patch(model)` inside upstream's PyTorch
models; `plans` makes attention plans; `analyze(captures, schedule)` tells what attention of any model looks like,
`plots` draws it. The pages: docs/python.md, docs/python-api.md.
"""

from . import _engine, analysis, plans, plots
from ._convert import Conversion, ConvertedFile, ConvertProgress, convert
from ._lpips import lpips
from .analysis import analyze
from .attention import AttentionState, attention
from .errors import Cancelled, Error, InputError, ResourceError, UsageError
from .lists import Bsr, KeyLists
from .patch import patch, unpatch
from .pipeline import Pipeline, PipelineOutput, ScaleState, ScaleTiming, Seed, Timings
from .plans import Plan, schedule

__version__ = _engine.version

__all__ = [
    "AttentionState",
    "Bsr",
    "Cancelled",
    "Conversion",
    "ConvertProgress",
    "ConvertedFile",
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
    "analysis",
    "analyze",
    "attention",
    "convert",
    "lpips",
    "patch",
    "plans",
    "plots",
    "schedule",
    "unpatch",
]
