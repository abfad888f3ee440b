"""Draws pictures: the walk over the scales that the engine makes, with the same rules for sampling bits."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantise import Pyramid
from .transformer import Infinity, rope_table


class Settings(NamedTuple):
    """As the engine's options. `top_p`: a bit whose rarer value has at most 1 - top_p is not drawn but taken."""

    cfg: float = 4.0
    tau: float = 0.7
    top_p: float = 0.97
    seed: int = 0
    greedy: bool = False


# Called with scale, layer, queries, keys [2B, H, tokens, head dim] (keys of all scales so far).
AttentionWatch = Callable[[int, int, Tensor, Tensor], None]
# Called with scale and the guided logits [B, tokens, 2 * bits].
LogitsWatch = Callable[[int, Tensor], None]


def draw_bits(logits: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """Logits [B, tokens, bits, 2] to bits [B, tokens, bits] bool."""
    p = torch.sigmoid(logits[..., 1] - logits[..., 0])
    if settings.greedy:
        return p > 0.5
    drawn = torch.rand(p.shape, generator=generator, device=p.device) < p
    rarer = torch.minimum(p, 1 - p)
    return torch.where(rarer <= 1 - settings.top_p, p > 0.5, drawn)


@torch.no_grad()
def walk(
    model: Infinity,
    pyramid: Pyramid,
    states: Tensor,
    mask: Tensor,
    settings: Settings = Settings(),
    scales: int | None = None,
    on_attention: AttentionWatch | None = None,
    on_logits: LogitsWatch | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Text states [B, T, D] to summed codes [B, d, n, n] and the bits of each scale [B, tokens, d]."""
    batch, device = states.shape[0], states.device
    generator = torch.Generator(device).manual_seed(settings.seed)
    nothing = model.cfg_uncond[None, : states.shape[1]].to(states.dtype).expand(batch, -1, -1)
    text = model.read_text(torch.cat([states, nothing]), torch.cat([mask, mask]))
    count = len(model.scales) if scales is None else scales
    rope = rope_table(model.width // model.heads, model.scales[:count], model.rope_grid).to(device)
    last = model.scales[-1]
    summed = torch.zeros(batch, model.bits, last, last, device=device)
    x, begin, drawn = model.start(text), 0, []
    cache: list[tuple[Tensor, Tensor]] = []
    for k in range(count):
        end = begin + model.scales[k] ** 2
        x = x + model.lvl_embed.weight[k]
        for i, block in enumerate(model.all_blocks()):
            q, key, value = block.before(x, text.ada, rope[:, begin:end])
            if k == 0:
                cache.append((key, value))
            else:
                cache[i] = (torch.cat([cache[i][0], key], 2), torch.cat([cache[i][1], value], 2))
            if on_attention is not None:
                on_attention(k, i, q, cache[i][0])
            x = block.after(x, F.scaled_dot_product_attention(q, *cache[i], scale=1.0), text)
        logits = model.logits(x, text.pooled)
        logits = (settings.cfg * logits[:batch] + (1 - settings.cfg) * logits[batch:]) / settings.tau
        if on_logits is not None:
            on_logits(k, logits)
        bits = draw_bits(logits.unflatten(-1, (model.bits, 2)), settings, generator)
        drawn.append(bits)
        grid = bits.transpose(1, 2).unflatten(2, (model.scales[k], model.scales[k]))
        summed = summed + pyramid.up(pyramid.codes(grid), k)
        if k + 1 < count:
            words = model.word_embed(pyramid.words(summed, k + 1)).float()
            x = torch.cat([words, words])
        begin = end
    return summed, drawn
