"""Lists of keys: tiles of queries of one scale, and for each tile the keys that all heads read.

They come of a static plan (`plan.lists(layer, scale_index)`), of FlashInfer's BSR arrays or of a FlexAttention
`BlockMask`, go back to both, and `sparvar.attention(q, k, v, plan=lists)` runs them.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _engine
from .errors import UsageError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Bsr:
    """Blocks of queries and keys that are computed, as FlashInfer's `BlockSparseAttentionWrapper.plan` takes them.

    Row block i of `block[0]` queries reads the key blocks `indices[indptr[i] : indptr[i + 1]]` of `block[1]` keys.
    """

    indptr: NDArray[np.int32]  # (row blocks + 1,)
    indices: NDArray[np.int32]  # (blocks that are computed,)
    shape: tuple[int, int]  # queries, keys
    block: tuple[int, int]  # queries and keys of a block; the last ones may be smaller
    exact: bool = True  # do the blocks hold the visible pairs and no others?


class KeyLists:
    """Tiles of queries and, for each, the keys it reads; the same for all heads and batch entries."""

    key: str  # names it among all lists of this process

    def __init__(self, handle: _engine.Lists) -> None:
        self.handle = handle
        digest = hashlib.sha256(f"{handle.keys}".encode())
        for part in (handle.tile_offset, handle.rows, handle.list_offset, handle.runs):
            digest.update(np.ascontiguousarray(part).tobytes() + b";")
        self.key = "lists:" + digest.hexdigest()
        _registered[self.key] = self

    def __repr__(self) -> str:
        share = 100 * self.share_of_pairs
        return f"<sparvar lists: {self.queries} queries, {self.keys} keys, {share:.2f} % of the pairs>"

    @property
    def queries(self) -> int:
        return self.handle.queries

    @property
    def keys(self) -> int:
        return self.handle.keys

    @property
    def share_of_pairs(self) -> float:
        """Of all query-key pairs, those that are computed."""
        return self.handle.share_of_pairs

    @property
    def tiles(self) -> list[NDArray[np.int32]]:
        """The queries of each tile."""
        return list(np.split(self.handle.rows, self.handle.tile_offset[1:-1]))

    @classmethod
    def of_tiles(cls, tiles: Sequence[ArrayLike], keys_of: Sequence[ArrayLike], keys: int) -> KeyLists:
        """`tiles[t]`: the queries of tile t, every query in one tile; `keys_of[t]`: the keys below `keys` it reads."""
        if len(tiles) != len(keys_of):
            raise UsageError(f"lists of keys: {len(tiles)} tiles, but keys of {len(keys_of)}")
        rows = [np.asarray(tile, np.int32).ravel() for tile in tiles]
        runs = [_runs(np.unique(np.asarray(of, np.int64)), keys) for of in keys_of]
        begin, count = (np.concatenate([run[side] for run in runs]) if runs else np.empty(0) for side in (0, 1))
        handle = _engine.Lists.of_arrays(
            _offsets([len(tile) for tile in rows]).astype(np.int32),
            np.concatenate(rows) if rows else np.empty(0, np.int32),
            _offsets([len(run[0]) for run in runs]),
            begin.astype(np.int32),
            count.astype(np.int32),
            keys,
        )
        if not np.array_equal(np.sort(handle.rows), np.arange(handle.queries, dtype=np.int32)):
            raise UsageError(f"lists of keys: the tiles must hold each of the queries 0 to {handle.queries - 1} once")
        return cls(handle)

    def visible(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The tile of each query, int64 (queries,), and what each tile sees, bool (tiles, keys)."""
        tile_offset, offset = self.handle.tile_offset, self.handle.list_offset
        runs = self.handle.runs.reshape(-1, 2)
        tile_of = np.empty(self.queries, np.int64)
        seen = np.zeros((len(tile_offset) - 1, self.keys), np.bool_)
        for tile in range(len(tile_offset) - 1):
            tile_of[self.handle.rows[tile_offset[tile] : tile_offset[tile + 1]]] = tile
            for begin, count in runs[offset[tile] : offset[tile + 1]]:
                seen[tile, begin : begin + count] = True
        return tile_of, seen

    def mask(self) -> NDArray[np.bool_]:
        """Which query sees which key, bool (queries, keys)."""
        tile_of, seen = self.visible()
        return seen[tile_of]

    # ---- FlashInfer

    def to_bsr(self, block: tuple[int, int] = (128, 128)) -> Bsr:
        """Blocks of queries and keys in row order with any visible pair.

        Exact for plans of such blocks (csla in the form "blocks"), and with a block of (1, 1); otherwise whole blocks
        stand for the pairs in them, and `exact` is False.
        """
        pairs = self._pairs_of_blocks(*block)
        rows, columns = np.nonzero(pairs)
        indptr = _offsets(np.count_nonzero(pairs, axis=1)).astype(np.int32)
        shape = (self.queries, self.keys)
        exact = bool(np.all(pairs[rows, columns] == _block_sizes(shape, block)[rows, columns]))
        return Bsr(indptr, columns.astype(np.int32), shape, block, exact)

    @classmethod
    def from_bsr(
        cls, indptr: ArrayLike, indices: ArrayLike, shape: tuple[int, int], block: tuple[int, int]
    ) -> KeyLists:
        """Of FlashInfer's arrays: int (row blocks + 1,) and (blocks,), queries and keys, and those of a block."""
        pointers, columns = np.asarray(indptr, np.int64), np.asarray(indices, np.int64)
        row_blocks, column_blocks = (-(-extent // size) for extent, size in zip(shape, block, strict=True))
        if pointers.shape != (row_blocks + 1,) or columns.ndim != 1:
            raise UsageError(
                f"bsr: indptr of shape {pointers.shape}; {row_blocks} row blocks need {row_blocks + 1} numbers"
            )
        if pointers[0] != 0 or pointers[-1] != len(columns) or np.any(np.diff(pointers) < 0):
            raise UsageError(f"bsr: indptr must ascend from 0 to the {len(columns)} indices")
        if len(columns) and (np.min(columns) < 0 or np.max(columns) >= column_blocks):
            raise UsageError(
                f"bsr: indices from {np.min(columns)} to {np.max(columns)}; there are {column_blocks} key blocks"
            )
        tiles, keys_of = [], []
        for i in range(row_blocks):
            tiles.append(np.arange(i * block[0], min((i + 1) * block[0], shape[0])))
            first = columns[pointers[i] : pointers[i + 1], None] * block[1]
            of = (first + np.arange(block[1])).ravel()
            keys_of.append(of[of < shape[1]])
        return cls.of_tiles(tiles, keys_of, shape[1])

    # ---- FlexAttention

    def to_block_mask(self, block: tuple[int, int] = (128, 128), device: Any = "cpu") -> BlockMask:
        """A FlexAttention `BlockMask` that shows exactly the same pairs, for any batch and heads."""
        import torch
        from torch.nn.attention.flex_attention import BlockMask

        pairs = self._pairs_of_blocks(*block)
        whole = pairs == block[0] * block[1]  # a block that reaches beyond the end is masked pair by pair
        tile_of, seen = (torch.from_numpy(part).to(device) for part in self.visible())

        def shows(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return seen[tile_of[query], key]

        def ordered(chosen: NDArray[np.bool_]) -> tuple[torch.Tensor, torch.Tensor]:
            order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
            count = np.count_nonzero(chosen, axis=1).astype(np.int32)
            return torch.from_numpy(count)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)

        some_count, some = ordered((pairs > 0) & ~whole)
        whole_count, all_of = ordered(whole)
        return BlockMask.from_kv_blocks(
            some_count,
            some,
            whole_count,
            all_of,
            BLOCK_SIZE=block,
            mask_mod=shows,
            seq_lengths=(self.queries, self.keys),
        )

    @classmethod
    def from_block_mask(cls, mask: BlockMask) -> KeyLists:
        """Of a FlexAttention `BlockMask` that is the same for all batch entries and heads. Its blocks are read, and
        where they are partial its `mask_mod`; queries that see the same keys become one tile.
        """
        import torch

        if tuple(mask.kv_num_blocks.shape[:2]) != (1, 1):
            raise UsageError(
                f"block mask: it differs by batch entry or head (shape {tuple(mask.kv_num_blocks.shape[:2])}); lists "
                "are shared by all"
            )
        queries, keys = (int(extent) for extent in mask.seq_lengths)
        rows, columns = (int(size) for size in mask.BLOCK_SIZE)
        zero = torch.zeros((), dtype=torch.long, device=mask.kv_num_blocks.device)
        tiles: list[ArrayLike] = []
        keys_of: list[ArrayLike] = []
        for i in range(-(-queries // rows)):
            of_block = torch.arange(i * rows, min((i + 1) * rows, queries), device=zero.device)
            seen = np.zeros((len(of_block), keys), np.bool_)
            for begin in _blocks_of(mask.full_kv_num_blocks, mask.full_kv_indices, i, columns):
                seen[:, begin : begin + columns] = True
            for begin in _blocks_of(mask.kv_num_blocks, mask.kv_indices, i, columns):
                key = torch.arange(begin, min(begin + columns, keys), device=zero.device)
                shown = mask.mask_mod(zero, zero, of_block[:, None], key[None, :])
                seen[:, begin : begin + columns] = torch.as_tensor(shown).expand(len(of_block), len(key)).cpu().numpy()
            rows_of, tile_of = np.unique(np.packbits(seen, axis=1), axis=0, return_inverse=True)
            for tile in range(len(rows_of)):
                own = np.flatnonzero(tile_of.ravel() == tile)
                tiles.append(own + i * rows)
                keys_of.append(np.flatnonzero(seen[own[0]]))
        return cls.of_tiles(tiles, keys_of, keys)

    def _pairs_of_blocks(self, rows: int, columns: int) -> NDArray[np.int64]:
        """Visible pairs of every block, (row blocks, column blocks)."""
        if rows < 1 or columns < 1:
            raise UsageError(f"a block of {rows} queries and {columns} keys; both must be at least 1")
        tile_of, seen = self.visible()
        of_tile = np.add.reduceat(seen, np.arange(0, self.keys, columns), axis=1, dtype=np.int64)
        out = np.zeros((-(-self.queries // rows), of_tile.shape[1]), np.int64)
        np.add.at(out, np.arange(self.queries) // rows, of_tile[tile_of])
        return out


_registered: weakref.WeakValueDictionary[str, KeyLists] = weakref.WeakValueDictionary()


def registered(key: str) -> KeyLists:
    """The lists of a key, as long as somebody holds them."""
    found = _registered.get(key)
    if found is None:
        raise UsageError("attention: the lists of keys that this program was compiled with are gone; keep them")
    return found


def _offsets(counts: ArrayLike) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)


def _runs(keys: NDArray[np.int64], all_keys: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First keys and lengths of the runs of ascending keys."""
    if len(keys) and (keys[0] < 0 or keys[-1] >= all_keys):
        raise UsageError(f"lists of keys: keys from {keys[0]} to {keys[-1]}; there are {all_keys}")
    ends = np.flatnonzero(np.diff(keys) != 1)
    first = np.concatenate([keys[:1], keys[ends + 1]])
    last = np.concatenate([keys[ends], keys[-1:]])
    return first, last - first + 1


def _block_sizes(shape: tuple[int, int], block: tuple[int, int]) -> NDArray[np.int64]:
    rows, columns = (
        np.minimum(size, extent - np.arange(0, extent, size)) for extent, size in zip(shape, block, strict=True)
    )
    return np.outer(rows, columns)


def _blocks_of(counts: Any, indices: Any, row: int, columns: int) -> list[int]:
    """First keys of the blocks that a row of blocks names."""
    if counts is None:
        return []
    count = int(counts[0, 0, row])
    return [int(block) * columns for block in indices[0, 0, row, :count]]
