"""Pictures: the same as the program's, callbacks, errors, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

import sparvar
from sparvar import plans

QUIET = {**os.environ, "OMP_WAIT_POLICY": "passive"}


def draw(program, folder, *arguments):
    """The program's pictures, in order."""
    command = [program, "generate", *map(str, arguments), "-o", folder, "--json", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=QUIET, timeout=600)
    report = json.loads(done.stdout)
    return [np.asarray(Image.open(picture["path"])) for picture in report["pictures"]]


def test_pictures_are_the_programs(pipe, program, model, tmp_path):
    """Whole pictures, several prompts and several pictures of each, bit for bit."""
    expected = draw(
        program, tmp_path, "red apple, 3d style", "a boat", "-n", 2, "--seed", 7, "--cfg", 4, "--size", "0.25M",
        "--tau", 0.7, "--model", model,
    )  # fmt: skip
    out = pipe(
        ["red apple, 3d style", "a boat"], seed=7, guidance_scale=4, tau=0.7, num_images_per_prompt=2, size="0.25M"
    )
    assert len(out.images) == len(expected) == 4
    for image, picture in zip(out.images, expected, strict=True):
        assert np.array_equal(np.asarray(image), picture)
    assert [seed.picture for seed in out.seeds] == [0, 1, 2, 3]
    again = pipe("a boat", seed=out.seeds[3], guidance_scale=4, tau=0.7, size="0.25M").images[0]
    assert np.array_equal(np.asarray(again), expected[3])


def test_a_whole_picture_is_the_programs(pipe, program, model, tmp_path):
    expected = draw(
        program, tmp_path, "red heart, noto style", "--seed", 3, "--attention", "published", "--model", model
    )
    image = pipe("red heart, noto style", seed=3, attention="published").images[0]
    assert image.size == (pipe.info["picture_width"], pipe.info["picture_height"])
    assert np.array_equal(np.asarray(image), expected[0])


def test_float32_and_a_plan_of_ones_own(program, model, few_scales, tmp_path):
    """A plan's file, its object and its text draw what the program draws with it."""
    plan = plans.probe([1, 2, 4, 6], scales=(2, -1), stride=2, share=0.3, tile=(2, 2), window=1)
    plan.save(tmp_path / "plan.json")
    arguments = ("--dtype", "f32", "--plan", tmp_path / "plan.json", "--seed", 5, "--model", few_scales)
    expected = draw(program, tmp_path, "a boat", *arguments)[0]
    pipe = sparvar.Pipeline.from_pretrained(few_scales, device="cpu", dtype="float32")
    for attention in (plan, tmp_path / "plan.json", plans.from_json(plan.to_json())):
        out = pipe("a boat", seed=5, attention=attention)
        assert np.array_equal(np.asarray(out.images[0]), expected)
    assert out.timings.scales[3].share_of_pairs < 1
    assert "probe" in out.timings.attention


def test_the_models_own_plan(program, few_scales, tmp_path):
    """plan.json in the folder is the default, as it is the program's."""
    pipe = sparvar.Pipeline.from_pretrained(few_scales, device="cpu")
    assert pipe("a boat", seed=5).timings.attention.startswith("sparvar: ")
    plan = plans.probe([1, 2, 4, 6], scales=(2, -1), stride=2, share=0.3, tile=(2, 2), window=1)
    plan.save(few_scales / "plan.json")
    own = pipe("a boat", seed=5)
    assert "probe" in own.timings.attention
    expected = draw(program, tmp_path, "a boat", "--seed", 5, "--model", few_scales)[0]
    assert np.array_equal(np.asarray(own.images[0]), expected)
    assert np.array_equal(np.asarray(own.images[0]), np.asarray(pipe("a boat", seed=5, attention=plan).images[0]))
    dense = pipe("a boat", seed=5, attention="dense")
    assert dense.timings.attention.startswith("dense")
    assert own.timings.scales[3].share_of_pairs < dense.timings.scales[3].share_of_pairs == 1
    larger = pipe("a boat", seed=5, size="0.06M")
    assert larger.timings.attention.startswith("sparvar: "), "it has more scales than the model"
    (few_scales / "plan.json").write_text("{")
    with pytest.raises(sparvar.InputError, match=r"plan\.json: not JSON"):
        pipe("a boat")
    assert pipe("a boat", attention="dense").images


def test_kinds_of_output(few_scales):
    pipe = sparvar.Pipeline.from_pretrained(few_scales, device="cpu")
    image = pipe("a boat", seed=1).images[0]
    out = pipe("a boat", seed=1, num_images_per_prompt=2, output_type="np")
    assert out.images.dtype == np.float32 and out.images.shape == (2, image.height, image.width, 3)
    assert np.array_equal((out.images[0] * 255).round().astype(np.uint8), np.asarray(image))
    assert next(iter(out)) is out.images
    try:
        import torch
    except ImportError:
        with pytest.raises(sparvar.UsageError, match="needs PyTorch"):
            pipe("a boat", output_type="pt")
    else:
        tensor = pipe("a boat", seed=1, output_type="pt").images
        assert tensor.shape == (1, 3, image.height, image.width)
        assert torch.equal(tensor[0], torch.from_numpy(out.images[0].transpose(2, 0, 1).copy()))


def test_seeds_and_generators(few_scales):
    pipe = sparvar.Pipeline.from_pretrained(few_scales, device="cpu")

    def pixels(**options):
        return np.asarray(pipe("a boat", **options).images[0])

    fresh = pipe("a boat")
    assert np.array_equal(pixels(seed=fresh.seeds[0]), np.asarray(fresh.images[0]))
    assert pipe("a boat").seeds[0].seed != fresh.seeds[0].seed
    assert pipe("a boat", generator=12).seeds == [sparvar.Seed(12, 0)]
    one, other = np.random.default_rng(4), np.random.default_rng(4)
    first = pipe("a boat", generator=one).seeds
    assert first == pipe("a boat", generator=other).seeds != pipe("a boat", generator=one).seeds
    assert pipe("a boat", seed=(1 << 64) - 1, num_images_per_prompt=2).seeds[1].picture == 1
    for wrong in (-1, 1 << 64, 0.5, True):
        with pytest.raises(sparvar.UsageError, match="seed"):
            pipe("a boat", seed=wrong)
    with pytest.raises(sparvar.UsageError, match="one of them"):
        pipe("a boat", seed=1, generator=2)
    with pytest.raises(sparvar.UsageError, match="generator"):
        pipe("a boat", generator="x")


def test_torch_generators(few_scales):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pipe = sparvar.Pipeline.from_pretrained(few_scales, device="cpu")
    one, other = (torch.Generator().manual_seed(4) for _ in range(2))
    first = pipe("a boat", generator=one).seeds
    assert first == pipe("a boat", generator=other).seeds != pipe("a boat", generator=one).seeds


def test_callbacks_hear_of_every_scale(few_scales):
    pipe = sparvar.Pipeline.from_pretrained(few_scales, device="cpu")
    heard = []

    def callback(pipeline, scale, state):
        assert pipeline is pipe and scale == state.scale
        heard.append(state)

    out = pipe(
        "a boat", seed=1, num_images_per_prompt=3, batch_size=2, callback_on_scale_end=callback, callback_previews=1
    )
    assert [(state.batch, state.scale) for state in heard] == [(b, k) for b in range(2) for k in range(4)]
    assert {(state.batches, state.scales) for state in heard} == {(2, 4)}
    assert [state.grid for state in heard[:4]] == list(pipe.schedule)
    assert [len(state.previews) for state in heard] == [0, 2, 2, 0, 0, 1, 1, 0]
    assert heard[1].previews[0].size == out.images[0].size
    assert not np.array_equal(np.asarray(heard[2].previews[0]), np.asarray(out.images[0]))
    assert out.timings.batches == 2 and out.timings.preview_seconds > 0
    plain = pipe("a boat", seed=1, num_images_per_prompt=3, batch_size=2)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(plain.images, out.images, strict=True))


def test_what_a_callback_raises_ends_the_run(few_scales):
    pipe = sparvar.Pipeline.from_pretrained(few_scales, device="cpu")
    heard = []

    def callback(pipeline, scale, state):
        heard.append(scale)
        if scale == 1:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        pipe("a boat", callback_on_scale_end=callback)
    assert heard == [0, 1]
    with pytest.raises(sparvar.UsageError, match="its own callback"):
        pipe("a boat", callback_on_scale_end=lambda pipeline, scale, state: pipeline("a boat"))
    assert pipe("a boat", seed=1).images  # it can be used again


def test_threads_take_turns(few_scales):
    pipe = sparvar.Pipeline.from_pretrained(few_scales, device="cpu")
    expected = [np.asarray(pipe("a boat", seed=i).images[0]) for i in range(4)]
    results = [None] * 4

    def run(i):
        results[i] = np.asarray(pipe("a boat", seed=i).images[0])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))


def test_other_threads_run_while_a_picture_is_drawn(few_scales):
    pipe = sparvar.Pipeline.from_pretrained(few_scales, device="cpu")
    counted, done, marks = [0], threading.Event(), []

    def count():
        while not done.is_set():
            counted[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is made to give the GIL away
    try:
        thread.start()
        pipe(
            "a boat",
            num_images_per_prompt=16,
            batch_size=1,
            callback_on_scale_end=lambda pipeline, scale, state: marks.append(counted[0]),
        )
    finally:
        done.set()
        sys.setswitchinterval(before)
        thread.join()
    assert len(marks) == 64 and len(set(marks)) > 1, "the GIL was held from the first scale to the last"


INTERRUPTED = """
import signal, sys, threading, os
import sparvar
pipe = sparvar.Pipeline.from_pretrained(sys.argv[1], device="cpu")
pipe.set_progress_bar_config(disable=True)
heard = []
def callback(p, scale, state):
    heard.append(scale)
    if len(heard) == 1:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    pipe("a boat", num_images_per_prompt=200, batch_size=2, callback_on_scale_end=callback)
    print("not interrupted")
except KeyboardInterrupt:
    scales = len(heard)
    pipe("a boat")
    print("interrupted", scales)
"""


def test_ctrl_c_is_keyboard_interrupt(model):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(model)], capture_output=True, text=True, timeout=600, env=QUIET
    )
    assert done.stdout.startswith("interrupted"), done.stdout + done.stderr
    assert int(done.stdout.split()[1]) < 200 * 13 // 2
    assert done.returncode == 0 and signal.SIGINT.name not in done.stderr


def test_sizes_in_pixels(pipe):
    image = pipe("a boat", seed=1, height=128, width=128).images[0]
    assert image.size == (128, 128)
    same = pipe("a boat", seed=1, size="0.06M").images[0]
    assert np.array_equal(np.asarray(image), np.asarray(same))
    wide = pipe("a boat", seed=1, aspect="2:1", size="0.06M").images[0]
    assert wide.size[0] == 2 * wide.size[1]
    with pytest.raises(sparvar.UsageError, match="nearest are 128 high and 128 wide"):
        pipe("a boat", height=120, width=130)
    with pytest.raises(sparvar.UsageError, match="either"):
        pipe("a boat", height=128, size="0.06M")


def test_errors_are_the_engines(model, few_scales, tmp_path):
    load = sparvar.Pipeline.from_pretrained
    with pytest.raises(sparvar.UsageError, match="no such folder"):
        load("models/none")
    with pytest.raises(sparvar.InputError, match=r"config\.json"):
        load(tmp_path)
    with pytest.raises(sparvar.UsageError, match="no device 'tpu'"):
        load(few_scales, device="tpu")
    with pytest.raises(sparvar.UsageError, match="dtype"):
        load(few_scales, dtype="float16")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in few_scales.iterdir():
        if file.name != "vae.safetensors":
            (broken / file.name).symlink_to(file.resolve())
    (broken / "vae.safetensors").write_bytes((model / "vae.safetensors").read_bytes()[:5000])
    with pytest.raises(sparvar.InputError, match=r"vae\.safetensors"):
        load(broken)
    pipe = load(few_scales, device="cpu")
    refused = [
        ({"guidance_scale": [1, 2]}, "expected 1 value or 4"),
        ({"guidance_scale": "much"}, "guidance_scale: expected a number"),
        ({"tau": float("nan")}, "tau"),
        ({"top_p": 1.5}, "top-p"),
        ({"skip_scales": 3}, "skip-scales"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"output_type": "latent"}, "output_type"),
        ({"negative_prompt": "ugly"}, "negative_prompt"),
        ({"attention": "clsa"}, "did you mean 'csla'"),
        ({"attention": plans.csla(sparvar.schedule())}, "another schedule"),
        ({"aspect": "7:1"}, "aspect"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt: expected a whole number, found 1.5"),
        ({"batch_size": -1}, "batch_size: expected a whole number from 0"),
        ({"first_picture": 1 << 64}, "first_picture"),
        ({"top_k": "x"}, "top_k"),
        ({"top_p": [0.1, 0.2]}, "top_p: expected one number"),
        ({"callback_previews": True}, "callback_on_scale_end"),
    ]
    for options, message in refused:
        with pytest.raises(sparvar.UsageError, match=message):
            pipe("a boat", **options)
    with pytest.raises(sparvar.UsageError, match="no prompt"):
        pipe([])
    with pytest.raises(sparvar.UsageError, match="prompt: expected a text"):
        pipe([b"a boat"])


def test_progress_bars(few_scales, capsys):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    pipe = sparvar.Pipeline.from_pretrained(few_scales, device="cpu", progress=True)
    pipe.set_progress_bar_config(desc="drawing")
    pipe("a boat")
    shown = capsys.readouterr().err
    assert "loading: 100%" in shown and "drawing: 100%" in shown and "4/4" in shown
    pipe.set_progress_bar_config(disable=True)
    pipe("a boat")
    assert capsys.readouterr().err == ""


def test_no_progress_without_tqdm(few_scales, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    sparvar.Pipeline.from_pretrained(few_scales, device="cpu")("a boat")
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
def test_a_gpu_draws(model):
    pipe = sparvar.Pipeline.from_pretrained(model, device="cuda")
    assert pipe.device == "cuda" and "cuda" in pipe.info["backend"]
    heard = []
    out = pipe("red apple, 3d style", seed=7, callback_on_scale_end=lambda p, scale, state: heard.append(scale))
    assert heard == list(range(13))
    again = pipe("red apple, 3d style", seed=7)
    assert np.array_equal(np.asarray(out.images[0]), np.asarray(again.images[0]))
    assert again.timings.recordings == 0


@pytest.mark.gpu
def test_a_gpu_shows_pictures_on_the_way(model):
    """As the CPU does, and the picture is the one without them."""
    pipe = sparvar.Pipeline.from_pretrained(model, device="cuda")
    arguments = {"num_images_per_prompt": 2, "batch_size": 2, "seed": 7}
    plain = pipe("red apple, 3d style", **arguments)
    heard = []
    for _ in range(2):
        out = pipe(
            "red apple, 3d style",
            callback_on_scale_end=lambda p, scale, state: heard.append([np.asarray(x) for x in state.previews]),
            callback_previews=9,
            **arguments,
        )
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(plain.images, out.images, strict=True))
        assert out.timings.preview_seconds > 0
    assert out.timings.recordings == 0
    assert [len(previews) for previews in heard[:13]] == [0] * 9 + [2] * 3 + [0]
    for first, second in zip(heard[:13], heard[13:], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    for skipped in (1, 2):  # a preview is the picture without the scales to come
        short = pipe("red apple, 3d style", skip_scales=skipped, **arguments)
        assert all(np.array_equal(np.asarray(a), b) for a, b in zip(short.images, heard[12 - skipped], strict=True))


@pytest.mark.gpu
def test_previews_that_were_stopped_leave_nothing(model):
    pipe = sparvar.Pipeline.from_pretrained(model, device="cuda")
    expected = [np.asarray(pipe("red apple, 3d style", seed=seed).images[0]) for seed in (7, 8)]

    def stop(pipeline, scale, state):
        if scale == 10:
            raise LookupError("enough")

    fresh = sparvar.Pipeline.from_pretrained(model, device="cuda")
    shown = {"callback_on_scale_end": lambda *_: None, "callback_previews": 8}
    for arguments in ({}, shown, shown, {}):
        with pytest.raises(LookupError, match="enough"):
            fresh("red apple, 3d style", seed=8, callback_on_scale_end=stop, callback_previews=8)
        for seed, picture in zip((7, 8), expected, strict=True):
            assert np.array_equal(np.asarray(fresh("red apple, 3d style", seed=seed, **arguments).images[0]), picture)


@pytest.mark.gpu
def test_a_gpu_is_analyzed_as_the_cpu(few_scales):
    """Same bits in float32, so the same queries and keys up to rounding; and pictures afterwards are what they were."""
    cpu, gpu = (sparvar.Pipeline.from_pretrained(few_scales, device=name, dtype="float32") for name in ("cpu", "cuda"))
    plain = np.asarray(gpu("a boat", seed=1).images[0])
    expected, found = (pipe.analyze(["a boat", "red apple"], scales=[2, 3], side=4) for pipe in (cpu, gpu))
    for name in ("mass", "sinks", "similarity", "own_distance"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-4, err_msg=name)
    assert np.array_equal(np.asarray(gpu("a boat", seed=1).images[0]), plain)
    fresh = sparvar.Pipeline.from_pretrained(few_scales, device="cuda", dtype="float32")
    fresh.analyze("a boat", side=4)
    assert np.array_equal(np.asarray(fresh("a boat", seed=1).images[0]), plain)
