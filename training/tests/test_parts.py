"""Each part against its definition written out."""

import json
import lzma
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.attention_report import window_mask
from training.checkpoint import Folders
from training.config import EMOJI, TINY, preset
from training.data import caption, clean_name, make_lists, read_drawings, read_list
from training.errors import TrainingError
from training.export import quantise_int8
from training.files import load_shards, save_shards
from training.loop import Ema, StageState, State, cosine
from training.quantise import Pyramid
from training.render import PictureStore, render
from training.run import newest_state
from training.sampling import Settings, draw_bits, walk
from training.team import Team
from training.text_encoder import T5Encoder, relative_buckets
from training.tokens import Tokenizer, caption_table, train_tokenizer
from training.train_transformer import TransformerTraining
from training.train_vae import VaeTraining
from training.transformer import Infinity
from training.vae import BsqVae, straight_through

SCALES = (1, 2, 3, 5, 8)


def test_quantise_agrees_with_interpolate() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 16, 8, 8)
    summed = torch.zeros_like(features)
    expected = []
    for s in SCALES:
        bit = F.interpolate(features - summed, size=(s, s), mode="area") > 0
        code = torch.where(bit, 0.25, -0.25)
        summed = summed + F.interpolate(code, size=(8, 8), mode="bilinear", align_corners=False)
        expected.append(bit.flatten(2).transpose(1, 2))
    pyramid = Pyramid(SCALES)
    assert torch.allclose(pyramid.quantise(features), summed, atol=1e-5)
    for k, bit in enumerate(pyramid.bits(features)):
        assert torch.equal(bit, expected[k])


def test_dropped_scales_are_left_out_of_the_sum() -> None:
    features = torch.randn(2, 16, 8, 8)
    both, whole = Pyramid(SCALES).quantise_both(features, torch.tensor([3, 5]))
    first, short = whole, Pyramid(SCALES).quantise(features, dropped=2)
    assert torch.equal(both[1], first[1])
    assert torch.allclose(both[0], short[0])
    assert not torch.allclose(both[0], whole[0])


def test_training_inputs_without_errors_are_the_bits() -> None:
    features = torch.randn(2, 16, 8, 8)
    pyramid = Pyramid(SCALES)
    clean = pyramid.training_inputs(features, 4, strength=0.0)
    assert torch.equal(clean.bits, torch.cat(pyramid.bits(features, 4), 1))
    assert clean.words.shape == (2, sum(s * s for s in SCALES[1:4]), 16)
    torch.manual_seed(1)
    noisy = pyramid.training_inputs(features, 4, strength=0.9)
    assert torch.equal(noisy.bits[:, :1], clean.bits[:, :1]), "the first scale has no input to be wrong"
    assert not torch.equal(noisy.bits, clean.bits), "later targets repair the errors put in"


def test_gradient_reaches_the_encoder_through_the_bits() -> None:
    features = torch.randn(1, 16, 8, 8, requires_grad=True)
    straight_through(features, Pyramid(SCALES).quantise(features)).sum().backward()
    assert features.grad is not None
    assert torch.equal(features.grad, torch.ones_like(features))


def test_drawing_scale_by_scale_is_the_training_pass() -> None:
    """The walk with its cache and the one pass over all scales give the same logits for the same bits."""
    torch.manual_seed(0)
    model = Infinity(TINY).eval()
    states, mask = torch.randn(2, 6, TINY.text.width), torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    seen: list[torch.Tensor] = []
    pyramid = Pyramid(TINY.scales)
    settings = Settings(cfg=1.0, tau=1.0, greedy=True)
    _, bits = walk(model, pyramid, states, mask, settings, on_logits=lambda k, x: seen.append(x))
    summed, words = torch.zeros(2, TINY.vae.bits, 8, 8), []
    for k, side in enumerate(TINY.scales[:-1]):
        grid = bits[k].transpose(1, 2).unflatten(2, (side, side))
        summed = summed + pyramid.up(pyramid.codes(grid), k)
        words.append(pyramid.words(summed, k + 1))
    with torch.no_grad():
        text = model.read_text(states, mask)
        once = model(text, torch.cat(words, 1), model.layout(len(TINY.scales), "cpu"))
    pairs = torch.cat(seen, 1).unflatten(-1, (TINY.vae.bits, 2))
    assert torch.allclose(once, pairs[..., 1] - pairs[..., 0], atol=1e-4)


def test_layout_hides_later_scales() -> None:
    layout = Infinity(TINY).layout(3, "cpu")
    assert layout.ends == (1, 5, 21)
    assert layout.mask.shape == (21, 21)
    assert layout.mask[0].sum() == 1
    assert layout.mask[2].sum() == 5
    assert layout.mask[20].all()


def test_a_rare_bit_is_taken_not_drawn() -> None:
    logits = torch.tensor([0.0, math.log(0.98 / 0.02)]).expand(1, 4000, 1, 2)
    settings = Settings(top_p=0.97)
    assert draw_bits(logits, settings, torch.Generator().manual_seed(0)).all()
    drawn = draw_bits(logits, settings._replace(top_p=1.0), torch.Generator().manual_seed(0))
    assert 0.96 < drawn.float().mean() < 0.995


def test_relative_buckets() -> None:
    """The table of T5 for 32 buckets and 128 places."""
    buckets = relative_buckets(200, 32, 128)
    assert buckets[0, :12].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24, 24, 24, 24]
    assert buckets[10, :11].tolist() == [8, 8, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert buckets.max() == 31
    assert buckets[199, 0] == 15


def test_padding_does_not_change_text() -> None:
    torch.manual_seed(0)
    encoder = T5Encoder(TINY.text).eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    padded = torch.tensor([[5, 6, 7, 1, 0, 0]])
    with torch.no_grad():
        assert torch.allclose(encoder(ids), encoder(padded)[:, :4], atol=1e-5)


def test_vae_shapes() -> None:
    for size, pixels in ((TINY.vae, 64), (EMOJI.vae, 64)):
        vae = BsqVae(size)
        features = vae.encoder(torch.zeros(1, 3, pixels, pixels))
        assert features.shape == (1, size.bits, pixels // size.patch, pixels // size.patch)
        assert vae.decoder(features).shape == (1, 3, pixels, pixels)


def test_window_mask_against_its_definition() -> None:
    scales = EMOJI.scales
    places = torch.tensor([0, 17, 63])
    mask = window_mask(scales, places)
    windows, column = (-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 3, 5, 7), 0
    for j, side in enumerate(scales):
        for key in range(side * side):
            for row, (y, x) in enumerate((y, x) for y in places.tolist() for x in places.tolist()):
                near = [
                    abs(round(c / 64 * side) - v) <= windows[j] // 2 for c, v in ((y, key // side), (x, key % side))
                ]
                expected = j < 5 or (windows[j] > 0 and all(near))
                assert mask[row, column] == expected, (j, key, y, x)
            column += 1


def test_names_are_made_alike() -> None:
    assert clean_name("Thumbs_Up:tone2") == "thumbs up medium light skin tone"
    assert clean_name("artist medium dark") == "artist medium dark skin tone"
    assert clean_name("light bulb") == "light bulb"
    assert clean_name("flag for flag china") == "flag china"


def test_captions_favour_the_base_form(data: Path) -> None:
    drawing = read_drawings(data)[0]
    rng = random.Random(0)
    captions = [caption(drawing, rng) for _ in range(2000)]
    assert 0.55 < captions.count(drawing.prompt) / 2000 < 0.66
    assert any(drawing.keywords[0] in text for text in captions)


def test_lists_are_disjoint_and_fixed_by_the_seed(data: Path) -> None:
    drawings = read_drawings(data)
    lists = make_lists(drawings, count=5)
    assert lists == make_lists(drawings, count=5)
    assert not set(lists["noto"]) & set(lists["validation"])
    stored = {name: set(read_list(name)) for name in ("noto", "unseen", "validation")}
    assert len(stored["noto"]) == len(stored["unseen"]) == 200
    assert not stored["noto"] & stored["unseen"]
    assert not stored["noto"] & stored["validation"]


def test_rendering_is_resumed_and_held_out_pictures_are_never_drawn(data: Path, tmp_path: Path) -> None:
    drawings = read_drawings(data)
    render(drawings, tmp_path, 64, workers=1, quiet=True)
    shard = tmp_path / "shard-00000.npy"
    before = shard.stat().st_mtime_ns
    render(drawings, tmp_path, 64, workers=1, quiet=True)
    assert shard.stat().st_mtime_ns == before
    store = PictureStore.load(tmp_path, drawings, torch.device("cpu"))
    assert store.pictures.shape == (len(drawings), 3, 64, 64)
    assert (store.pictures[:, :, :4] == 255).all(), "the margin is white"
    weights = store.training_weights({drawings[0].key})
    drawn = np.random.default_rng(0).choice(len(weights), 5000, p=weights)
    where = [d.key for d in store.drawings].index(drawings[0].key)
    assert where not in drawn
    with pytest.raises(TrainingError, match="holds other pictures"):
        render(drawings, tmp_path, 32, workers=1, quiet=True)


def test_an_unreadable_drawing_is_left_out(data: Path, tmp_path: Path) -> None:
    drawings = read_drawings(data)[:3]
    drawings[1].svg = "<svg"
    render(drawings, tmp_path, 32, workers=1, quiet=True)
    assert len(PictureStore.load(tmp_path, drawings, torch.device("cpu")).drawings) == 2


def test_a_broken_line_of_data_is_named(tmp_path: Path) -> None:
    with lzma.open(tmp_path / "noto.jsonl.xz", "wt") as file:
        file.write(json.dumps({"name": "a", "svg": "b"}) + "\n{}\n")
    with pytest.raises(TrainingError, match=r"noto.jsonl.xz: line 2"):
        read_drawings(tmp_path)
    with pytest.raises(TrainingError, match="none of"):
        read_drawings(tmp_path / "nowhere")


def test_tokenizer(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "spiece.model"
    train_tokenizer(read_drawings(data), path, TINY.text.vocab)
    tokenizer = Tokenizer(path)
    assert len(tokenizer) <= TINY.text.vocab
    ids = tokenizer.batch(["shape, noto style", "shape"])
    assert ids[1, -1] == 0
    assert (ids == 1).sum(1).tolist() == [1, 1]
    assert tokenizer.batch(["shape " * 40], limit=8)[0, -1] == 1
    drawings = read_drawings(data)[:3]
    table = caption_table(tokenizer, drawings, 5, 24, seed=0)
    assert table.shape == (3, 5, 24)
    bases = tokenizer.batch([d.prompt for d in drawings], 24)
    assert all((table[i].long() == bases[i]).all(1).any() for i in range(3)), "each drawing has its own captions"


def test_int8_is_close() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64) * torch.logspace(-2, 1, 64)[:, None]
    out, worst = quantise_int8({"ffn.fc1.weight": weight, "norm.weight": torch.ones(64)})
    assert out["ffn.fc1.weight"].dtype == torch.int8
    assert out["norm.weight"].dtype == torch.bfloat16
    again = out["ffn.fc1.weight"].float() * out["ffn.fc1.weight.scale"][:, None]
    assert ((again - weight).norm(dim=1) / weight.norm(dim=1)).max() < 0.02
    assert 0 < worst < 0.02


def test_average_and_rates() -> None:
    module = torch.nn.Linear(2, 2)
    first = module.weight.detach().clone()
    ema = Ema(module, 0.5, steps=1000)
    with torch.no_grad():
        module.weight.add_(1)
    ema.step()
    with ema.applied():
        assert torch.allclose(module.weight, first + 0.5)
    assert torch.allclose(module.weight, first + 1)
    assert cosine(2.0, 1.0, 0.0) == 2.0
    assert cosine(2.0, 1.0, 0.5) == pytest.approx(1.5)
    assert cosine(2.0, 1.0, 7.0) == 1.0


def test_the_bundled_size_fits() -> None:
    """Parameters of the preset at two bytes each, with the tokenizer, stay under 32 MB."""
    count = sum(
        t.numel() for m in (Infinity(EMOJI), T5Encoder(EMOJI.text), BsqVae(EMOJI.vae)) for t in m.state_dict().values()
    )
    assert 2 * count + 350_000 < 32_000_000
    with pytest.raises(TrainingError, match="there is no preset"):
        preset("huge")


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(data: Path, tmp_path: Path) -> None:
    """Weights, average and optimizer of both models: two steps are one step, a new object, and one step."""
    drawings, cpu = read_drawings(data), torch.device("cpu")
    render(drawings, tmp_path / "p", TINY.pixels, workers=1, quiet=True)
    store = PictureStore.load(tmp_path / "p", drawings, cpu)
    train_tokenizer(drawings, tmp_path / "s", TINY.text.vocab)
    features = torch.randn(len(drawings), TINY.vae.bits, 8, 8).half()

    def vae_step(folder: Path) -> VaeTraining:
        training = VaeTraining(TINY, cpu, Folders(folder, folder, None), State("tiny"), Team())
        torch.manual_seed(int(training.ema.steps))
        training.step(store.batch(torch.arange(2)))
        return training

    def bits_step(folder: Path) -> TransformerTraining:
        training = TransformerTraining(
            TINY, BsqVae(TINY.vae), store, features, Tokenizer(tmp_path / "s"), set(), cpu,
            Folders(folder, folder, None), State("tiny"), Team(),
        )  # fmt: skip
        torch.manual_seed(int(training.ema.steps))
        training.set_rate(1e-3)
        training.step(3, 4)
        return training

    for name, one_step in (("vae", vae_step), ("ar", bits_step)):
        training = one_step(tmp_path / name)
        training.save()
        after = {key: t.clone() for key, t in training.ema.tensors.items()}
        assert load_shards(tmp_path / name, name).keys() == after.keys()
        second = one_step(tmp_path / name)
        assert second.ema.steps == 2
        assert second.optimizer.state_dict()["state"][0]["step"] == 2
        assert any(not torch.equal(after[key], second.ema.tensors[key]) for key in after)


def test_newest_state(tmp_path: Path) -> None:
    """What was carried here wins over an older work folder, and the older checkpoints go."""
    folders = Folders(tmp_path / "work", tmp_path / "out", tmp_path / "carried")
    assert newest_state(TINY, folders).runs == 0
    State("tiny", {"vae": StageState(3.0, 30, 90)}, 1).save(tmp_path / "work")
    State("tiny", {"vae": StageState(5.0, 50, 150)}, 2).save(tmp_path / "carried")
    (tmp_path / "work/vae.pt").write_bytes(b"old")
    save_shards(tmp_path / "carried", "vae", {"x": torch.ones(2)})
    assert newest_state(TINY, folders).stage("vae").steps == 50
    assert not (tmp_path / "work/vae.pt").exists()
    assert load_shards(tmp_path / "work", "vae")["x"].tolist() == [1.0, 1.0]
    State("tiny", {"vae": StageState(6.0, 60, 180)}, 3).save(tmp_path / "work")
    assert newest_state(TINY, folders).stage("vae").steps == 60


def test_shards_stay_small(tmp_path: Path) -> None:
    save_shards(tmp_path, "x", {f"t{i}": torch.zeros(3_000_000) for i in range(6)})
    assert len(list(tmp_path.glob("x-*.safetensors"))) == 3
    save_shards(tmp_path, "x", {"t0": torch.zeros(10)})
    assert len(list(tmp_path.glob("x-*.safetensors"))) == 1
    (tmp_path / "y-0.safetensors").write_bytes(b"no")
    with pytest.raises(TrainingError, match="cannot be read"):
        load_shards(tmp_path, "y")
