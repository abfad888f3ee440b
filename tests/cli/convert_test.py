#!/usr/bin/env python3
"""convert as a user runs it, on checkpoints made of the bundled model: convert_test.py PROGRAM MODEL_DIR"""
import json
import os
import struct
import subprocess
import sys
import unittest
import zlib
from pathlib import Path

import cli_test
import torch_writer
from cli_test import read_png, run
from commands_test import CommandTest
from torch_writer import Tensor, read_safetensors, state_dict, widened

# What shapes do not tell of the bundled model; 7 scales draw 128x128 pixels.
SET = ["--set", "scales=[1,2,4,6,8,12,16]", "--set", "vae.norm_num_groups=8"]


class Shell:
    """What a hostile file would do."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class ConvertTest(CommandTest):
    def setUp(self):
        super().setUp()
        self.model = cli_test.MODEL
        self.transformer, self.vae, self.text = self.dir / "infinity.pth", self.dir / "vae.pth", self.dir / "flan-t5"
        self.made = self.out / "made"
        self.write()

    def write(self, change=lambda tensors: tensors):
        """The bundled model in upstream's forms; `change` is applied to the tensors of each part."""
        # A mask and a buffer, as upstream's files have them.
        extra = {"attn_bias_for_masking": ("F32", [1, 1, 2, 2], bytes(16)), "lvl_1L": ("I64", [1, 3], bytes(24))}
        transformer = state_dict({**change(read_safetensors(self.model / "transformer.safetensors")), **extra})
        name = "text_proj_for_ca.2.weight"
        dtype, shape, data = change(read_safetensors(self.model / "transformer.safetensors"))[name]
        transformer[name] = Tensor(dtype, shape, data, transposed=True)
        torch_writer.save(self.transformer, transformer)
        vae = state_dict({**change(read_safetensors(self.model / "vae.safetensors")), "quantize.lfq.mask": ("I64", [2], bytes(16))})
        torch_writer.save(self.vae, {"vae": vae, "epoch": 7, "args": {"lr": 1e-4, "names": ["a", None]}}, protocol=4)
        self.text.mkdir(exist_ok=True)
        config = json.loads((self.model / "config.json").read_text())["text_encoder"]
        del config["type"]
        (self.text / "config.json").write_text(json.dumps({**config, "model_type": "t5", "num_decoder_layers": 3, "dropout_rate": 0.1}))
        (self.text / "spiece.model").write_bytes((self.model / "spiece.model").read_bytes())
        text = change(read_safetensors(self.model / "text_encoder.safetensors"))
        text["decoder.block.0.layer.0.SelfAttention.q.weight"] = text["lm_head.weight"] = ("F32", [1, 1], bytes(4))
        names, index = sorted(text), {}
        for i, part in enumerate((names[:9], names[9:])):
            shard = f"pytorch_model-{i + 1:05}-of-00002.bin"
            torch_writer.save(self.text / shard, state_dict({name: text[name] for name in part}))
            index.update({name: shard for name in part})
        (self.text / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    def arguments(self, *more):
        defaults = json.loads((self.model / "config.json").read_text())["defaults"]
        same = [word for key, value in defaults.items() for word in ("--set", f"defaults.{key}={value}")]
        return ["convert", self.transformer, self.vae, self.text, "-o", self.made, *SET, *same, *more]

    def convert(self, *more):
        return json.loads(self.ok(*self.arguments("--json", "--quiet", *more)).stdout)

    def pixels(self, model, *more):
        picture = self.dir / "picture.png"
        self.ok("generate", "red apple, 3d style", "--seed", 3, "--model", model, "--threads", 1, "-o", picture, "--quiet", *more)
        return read_png(picture)[:3]

    def tensors(self, stem):
        """Of the converted model, from one file or its shards."""
        single = self.made / f"{stem}.safetensors"
        if single.exists():
            return read_safetensors(single)
        index = json.loads((self.made / f"{stem}.safetensors.index.json").read_text())["weight_map"]
        shards = {shard: read_safetensors(self.made / shard) for shard in set(index.values())}
        return {name: shards[shard][name] for name, shard in index.items()}


class Converts(ConvertTest):
    def test_the_same_picture(self):
        report = self.convert()
        self.assertEqual(sorted(path.name for path in self.made.iterdir()),
                         ["config.json", "convert.json", "spiece.model", "text_encoder.safetensors", "transformer.safetensors", "vae.safetensors"])
        for file in report["files"]:
            content = (self.made / file["name"]).read_bytes()
            self.assertEqual((file["bytes"], file["crc32"]), (len(content), f"{zlib.crc32(content):08x}"), file["name"])
        self.assertEqual(report["found_at"], [f"vae: at 'vae' of {self.vae}"])
        for name in ("transformer: attn_bias_for_masking", "transformer: lvl_1L", "vae: quantize.lfq.mask", "text encoder: lm_head.weight"):
            self.assertIn(name, report["skipped"])
        self.assertNotIn("decoder", str([name for name in report["skipped"] if name.startswith("vae")]))
        # Geometry from the shapes.
        made, real = json.loads((self.made / "config.json").read_text()), json.loads((self.model / "config.json").read_text())
        self.assertEqual(made, report["config"])
        for part in ("transformer", "vae", "text_encoder"):
            for key, value in made[part].items():
                self.assertEqual(value, real[part].get(key, value), f"{part}.{key}")
            self.assertEqual(set(real[part]) - set(made[part]) - {"attention", "rope2d_each_sa_layer", "use_bit_label"}, set())
        # Every tensor that the engine reads, bit by bit; and what it draws.
        for stem in ("transformer", "vae", "text_encoder"):
            real_tensors = read_safetensors(self.model / f"{stem}.safetensors")
            for name, tensor in self.tensors(stem).items():
                self.assertEqual(tensor, real_tensors[name], name)
        self.assertEqual(self.pixels(self.made), self.pixels(self.small_model()))
        self.ok("reconstruct", Path(__file__).parents[2] / "docs" / "face.png", "--model", self.made, "-o", self.dir / "again.png", "--quiet")

    def test_f32_and_shards(self):
        self.write(widened)
        report = self.convert("--dtype", "f32", "--shard-size", "4M")
        shards = [file["name"] for file in report["files"] if file["name"].startswith("transformer-")]
        self.assertGreater(len(shards), 3)
        for name, tensor in self.tensors("transformer").items():
            self.assertEqual(tensor[0], "F32", name)
        for shard in shards:
            self.assertLess((self.made / shard).stat().st_size, 4_100_000)
        self.assertEqual(self.pixels(self.made, "--dtype", "f32"), self.pixels(self.small_model(), "--dtype", "f32"))

    def test_bf16_rounds_matrices_to_nearest_even_and_keeps_vectors(self):
        def noisy(tensors):
            return {name: (dtype, shape, data if dtype != "F32" else b"".join(
                struct.pack("<I", struct.unpack("<I", data[i:i + 4])[0] | 0x8000 + (i >> 2) % 3 - 1) for i in range(0, len(data), 4)))
                    for name, (dtype, shape, data) in widened(tensors).items()}
        self.write(noisy)
        self.convert()
        made, given = self.tensors("vae"), noisy(read_safetensors(self.model / "vae.safetensors"))
        self.assertEqual(made["decoder.conv_in.conv.bias"], given["decoder.conv_in.conv.bias"])
        dtype, _, data = made["decoder.conv_out.conv.weight"]
        self.assertEqual(dtype, "BF16")
        for i in range(len(data) // 2):
            wide = struct.unpack_from("<I", given["decoder.conv_out.conv.weight"][2], 4 * i)[0]
            rounded = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16
            self.assertEqual(struct.unpack_from("<H", data, 2 * i)[0], rounded)

    def test_int8(self):
        self.convert("--dtype", "int8")
        made, given = self.tensors("transformer"), widened(read_safetensors(self.model / "transformer.safetensors"))
        name = "block_chunks.1.module.2.ffn.fc1.weight"
        (dtype, shape, data), (_, _, wide) = made[name], given[name]
        self.assertEqual((dtype, made[name + ".scale"][:2]), ("I8", ("F32", [shape[0]])))
        scales = struct.unpack(f"<{shape[0]}f", made[name + ".scale"][2])
        for row in (0, 100, shape[0] - 1):
            numbers = struct.unpack_from(f"<{shape[1]}f", wide, 4 * row * shape[1])
            self.assertAlmostEqual(scales[row], max(map(abs, numbers)) / 127, delta=1e-9)
            for i, number in enumerate(numbers):
                kept = struct.unpack_from("b", data, row * shape[1] + i)[0]
                self.assertLessEqual(abs(kept * scales[row] - number), scales[row] * 0.5001)
        self.assertEqual({tensor[0] for tensor in self.tensors("vae").values()}, {"BF16"})
        self.assertEqual(made["lvl_embed.weight"][0], "BF16")
        self.pixels(self.made)

    def test_wrappers_chunks_and_keys(self):
        inner = state_dict({"module." + name.replace(".module.", ".module._fsdp_wrapped_module."): tensor
                            for name, tensor in read_safetensors(self.model / "transformer.safetensors").items()})
        torch_writer.save(self.transformer, {"epoch": 1, "trainer": {"gpt_fsdp": inner, "opt": {"state": {}}}})
        self.assertEqual(self.convert()["found_at"][0], f"transformer: at 'trainer.gpt_fsdp' of {self.transformer}")
        self.assertEqual(self.tensors("transformer")["head.weight"], read_safetensors(self.model / "transformer.safetensors")["head.weight"])
        self.made = self.out / "other"
        vae = state_dict(read_safetensors(self.model / "vae.safetensors"))
        torch_writer.save(self.vae, {"vae": {}, "ema": vae})
        self.assertEqual(self.convert("--vae-key", "ema")["found_at"][1], f"vae: at 'ema' of {self.vae}")

    def test_the_report_for_people(self):
        result = self.ok(*self.arguments())
        text = result.stdout.decode()
        for words in ("read back and found right", "transformer.safetensors", "crc32", "skipped", "sparvar generate"):
            self.assertIn(words, text)
        self.assertIn("100 %", result.stderr.decode())


class GoesOn(ConvertTest):
    def test_where_it_stopped(self):
        arguments = ("--shard-size", "2M")
        whole = self.convert(*arguments)
        self.assertFalse(any(file["reused"] for file in whole["files"]))
        content = {file["name"]: (self.made / file["name"]).read_bytes() for file in whole["files"]}
        gone, damaged, short = [name for name in content if name.startswith("transformer-")][:3]
        (self.made / gone).unlink()
        (self.made / damaged).write_bytes(content[damaged][:-1] + bytes([content[damaged][-1] ^ 1]))
        (self.made / short).write_bytes(content[short][:-1])
        (self.made / "config.json").unlink()
        left = self.made / ".sparvar-4194305-0.tmp"  # above the largest process id
        left.write_bytes(b"of a process that was killed")
        again = self.convert(*arguments, "--resume")
        self.assertFalse(left.exists())
        self.assertEqual({file["name"] for file in again["files"] if not file["reused"]}, {gone, damaged, short, "config.json"})
        self.assertEqual({name: (self.made / name).read_bytes() for name in content}, content)
        self.assertTrue(json.loads((self.made / "convert.json").read_text())["complete"])

    def test_after_an_interrupt(self):
        # Stopped while it writes: no config.json, no half file; going on gives the model.
        process = subprocess.Popen([cli_test.PROGRAM, *map(str, self.arguments("--shard-size", "100k", "--quiet"))],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and len(list(self.made.glob("transformer-*.safetensors"))) < 3:
            pass
        process.kill()
        process.communicate()
        finished = {path.name: path.read_bytes() for path in self.made.glob("*.safetensors")}
        self.assertGreaterEqual(len(finished), 3)
        report = self.convert("--shard-size", "100k", "--resume")
        for name, content in finished.items():
            self.assertEqual((self.made / name).read_bytes(), content, name)
        self.assertGreaterEqual(sum(file["reused"] for file in report["files"]), len(finished) - 1)
        self.assertEqual(self.pixels(self.made), self.pixels(self.small_model()))

    def test_not_into_another_model(self):
        self.convert()
        for more, words in [([], ("--resume",)), (["--resume", "--dtype", "int8"], ("other checkpoints", "--dtype")),
                            (["--resume", "--set", "defaults.cfg=9"], ("--set",))]:
            result = run(*self.arguments(*more))
            self.assertEqual(result.returncode, 2)
            for word in words:
                self.assertIn(word, result.stderr.decode())
        (self.made / "convert.json").unlink()
        self.assertIn("no convert.json", run(*self.arguments("--resume")).stderr.decode())


class BadInput(ConvertTest):
    def refused(self, code, *words, more=()):
        self.assert_refused(run(*self.arguments("--quiet", *more)), code, *words)

    def test_usage(self):
        for arguments, code, *words in [
            (["convert"], 2, "three inputs"),
            (["convert", "a", "b", "-o", "c"], 2, "three inputs", "2"),
            (["convert", "a", "b", "c", "d", "-o", "e"], 2, "three inputs", "4"),
            (["convert", self.transformer, self.vae, self.text], 2, "-o"),
            (self.arguments("--dtype", "fp4"), 2, "--dtype", "bf16, f32, int8 or fp8"),
            (self.arguments("--set", "x"), 2, "KEY=VALUE"),
            (self.arguments("--set", "no.such=1"), 2, "no.such=1"),
            (self.arguments("--set", "transformer.depht=1"), 1, "depht", "depth"),
            (self.arguments("--vae-key", "ema"), 1, "ema", "'vae'"),
            (["convert", self.dir / "none.pth", self.vae, self.text, "-o", self.made], 1, "none.pth", "no such file"),
            (["convert", self.transformer, self.vae, self.vae, "-o", self.made], 1, "no folder"),
            (["convert", self.vae, self.vae, self.text, "-o", self.made], 1, "block_chunks", "missing"),
            (["convert", self.transformer, self.transformer, self.text, "-o", self.made], 1, "decoder.conv_in"),
        ]:
            with self.subTest(arguments):
                self.assert_refused(run(*arguments), code, *words)

    def test_what_shapes_do_not_tell(self):
        # The released models' groups do not fit this VAE: the message names the key to set.
        self.assert_refused(run("convert", self.transformer, self.vae, self.text, "-o", self.made), 1, "vae.norm_num_groups", "32")

    def changed_transformer(self, change):
        tensors = state_dict(read_safetensors(self.model / "transformer.safetensors"))
        change(tensors)
        torch_writer.save(self.transformer, tensors)

    def test_tensors_that_do_not_fit(self):
        name = "block_chunks.1.module.3.ca.proj.weight"
        self.changed_transformer(lambda tensors: tensors.pop(name))
        self.refused(1, name, "missing", "infinity.pth")
        self.changed_transformer(lambda tensors: tensors.update({name: Tensor("F32", (256, 128), bytes(131072))}))
        self.refused(1, name, "expected shape [256, 256], found [256, 128]")
        self.changed_transformer(lambda tensors: tensors.update({name: Tensor("I64", (256, 256), bytes(8 * 65536))}))
        self.refused(1, name, "floating-point", "I64")
        self.changed_transformer(lambda tensors: [tensors.pop(key) for key in list(tensors) if "module.3." in key and "chunks.1" in key])
        self.refused(1, "block_chunks.1.module.", "expected 4 blocks", "found 3")
        self.changed_transformer(lambda tensors: tensors.update({"word_embed.weight": Tensor("F32", (256, 24), bytes(4 * 256 * 24))}))
        self.refused(1, "word_embed.weight", "24 bits", "expected 16")
        nan = struct.pack("<f", float("nan"))
        self.changed_transformer(lambda tensors: tensors.update({name: Tensor("F32", (256, 256), bytes(4 * 65535) + nan)}))
        result = run(*self.arguments("--dtype", "int8", "--quiet"))
        self.assertEqual(result.returncode, 1)
        self.assertIn("not finite", result.stderr.decode())
        self.assertFalse((self.made / "config.json").exists())

    def test_damage_on_the_way(self):
        content = bytearray(self.vae.read_bytes())
        content[len(content) // 2] ^= 1
        self.vae.write_bytes(content)
        result = run(*self.arguments("--quiet"))
        self.assertEqual(result.returncode, 1)
        self.assertIn("checksum", result.stderr.decode())
        self.assertFalse((self.made / "config.json").exists())
        self.assertFalse((self.made / "vae.safetensors").exists())

    def test_text_folder(self):
        for change, *words in [(lambda: (self.text / "spiece.model").unlink(), "spiece.model"),
                               (lambda: (self.text / "config.json").write_text('{"model_type": "bert"}'), "model_type", "bert"),
                               (lambda: (self.text / "config.json").write_text('{"model_type": "t5"}'), "text_encoder"),
                               (lambda: (self.text / "config.json").unlink(), "config.json"),
                               (lambda: (self.text / "pytorch_model-00002-of-00002.bin").unlink(), "pytorch_model-00002-of-00002.bin")]:
            with self.subTest(words):
                self.write()
                change()
                self.refused(1, *words)

    def test_a_hostile_file_runs_nothing(self):
        marker = self.dir / "ran"
        for protocol in (2, 4):
            torch_writer.save(self.vae, {"vae": {"x": Shell(f"touch {marker}")}}, protocol=protocol)
            self.refused(1, "system", "STACK_GLOBAL" if protocol == 4 else "GLOBAL", "byte", "nothing was run", "vae.pth")
        self.assertFalse(marker.exists())


if __name__ == "__main__":
    cli_test.PROGRAM, cli_test.MODEL = os.path.abspath(sys.argv[1]), Path(sys.argv[2]).resolve()
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]], verbosity=2)
