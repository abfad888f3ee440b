"""Sentencepiece: training the tokenizer on the captions, and captions as padded ids."""

import io
import random
from pathlib import Path

import numpy as np
import torch

from .data import Drawing, caption
from .errors import TrainingError
from .files import write_bytes
from .text_encoder import EOS, PAD


def train_tokenizer(drawings: list[Drawing], path: Path, pieces: int) -> None:
    """Writes a unigram model with pad 0, eos 1, unk 2 (as T5's) trained on captions of the drawings."""
    import sentencepiece

    rng = random.Random(3)
    captions = [caption(d, rng) for d in drawings for _ in range(2)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        vocab_size=pieces,
        model_type="unigram",
        pad_id=PAD,
        eos_id=EOS,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    write_bytes(path, model.getvalue())


class Tokenizer:
    """Text to ids that end with EOS."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        if not path.exists():
            raise TrainingError(f"{path}: there is no sentencepiece model; run the stage `tokenizer` or name another")
        self._model = sentencepiece.SentencePieceProcessor(str(path))

    def __len__(self) -> int:
        return self._model.get_piece_size()

    def ids(self, text: str) -> list[int]:
        """Ids of one text, EOS at its end."""
        return [*self._model.encode(text), EOS]

    def batch(self, texts: list[str], limit: int | None = None) -> torch.Tensor:
        """[B, T] int64 padded with zeros; T is `limit`, or the longest text's length where none is given."""
        rows = [self.ids(text) for text in texts]
        width = limit or max(map(len, rows))
        out = np.full((len(rows), width), PAD, np.int64)
        for i, row in enumerate(rows):
            row = row if len(row) <= width else [*row[: width - 1], EOS]
            out[i, : len(row)] = row
        return torch.from_numpy(out)


def caption_table(tokenizer: Tokenizer, drawings: list[Drawing], variants: int, limit: int, seed: int) -> torch.Tensor:
    """[N, variants, limit] int16: captions of each drawing, drawn beforehand so that training never waits for them."""
    rng = random.Random(seed)
    captions = [caption(d, rng) for d in drawings for _ in range(variants)]
    rows = {text: i for i, text in enumerate(dict.fromkeys(captions))}  # most of them are the base form
    ids = tokenizer.batch(list(rows), limit).to(torch.int16)
    return ids[torch.tensor([rows[text] for text in captions])].view(len(drawings), variants, limit)
