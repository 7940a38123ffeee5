"""Where what a rank trains lies in the whole model: as boxes of tensors that have a name and a shape in every layout.

A tensor-parallel part is a box of a matrix. A shard of ZeRO is a range of that part's numbers, row by row, so at most
three boxes: the end of a row, whole rows, the beginning of a row. Padding lies in no parameter, and so in no box.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from data_parallel import Reducer, checksum
from tensor_parallel import sharded_modules
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from shared.model import LlamaForCausalLM


class Boxes(Tensor):
    """Boxes of a tensor of `shape`, by their offsets, as torch.distributed.checkpoint saves and loads them.

    It asks any object for the three methods below, but hands on nothing that is no tensor: so this is one, without
    memory of its own. What several ranks have at the same offset it saves once, and it checks that boxes neither
    overlap nor leave gaps.
    """

    @staticmethod
    def __new__(cls: type["Boxes"], shape: torch.Size, boxes: dict[torch.Size, Tensor]) -> "Boxes":
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=next(iter(boxes.values())).dtype)
        made.boxes = boxes
        return made

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, box.shape) for offset, box in self.boxes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.boxes[index.offset]

    def __repr__(self) -> str:
        return (
            f"Boxes({tuple(self.shape)}, { {tuple(offset): tuple(box.shape) for offset, box in self.boxes.items()} })"
        )

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:  # noqa: ANN001 (torch's own signature)
        raise NotImplementedError(f"{func} of Boxes")


class OwnBoxes(NamedTuple):
    """What a rank trains of the parameter `name`, which as a whole has `shape`; or a share of that."""

    name: str
    shape: torch.Size
    trained: nn.Parameter
    # Which of its numbers.
    part: slice
    # Offset in the whole, and size: they follow each other in that part.
    boxes: list[tuple[torch.Size, torch.Size]]

    def of(self, tensor: Tensor, copy: Tensor | None = None) -> Boxes:
        """The boxes of `tensor`, which is as `trained` is: views of it, or of `copy`, which is overwritten by them."""
        numbers = tensor.view(-1)[self.part]
        if copy is not None:
            numbers = copy.copy_(numbers, non_blocking=True)
        parts = numbers.split([size.numel() for _, size in self.boxes])
        pairs = zip(self.boxes, parts, strict=True)
        return Boxes(self.shape, {offset: part.view(size) for (offset, size), part in pairs})

    def checksums(self) -> dict[torch.Size, Tensor]:
        """Of each box, by its offset. () int64."""
        return {offset: checksum(box) for offset, box in self.of(self.trained.detach()).boxes.items()}


def range_boxes(shape: torch.Size, begin: int, end: int) -> Iterator[tuple[torch.Size, torch.Size]]:
    """Offset and size of the boxes that make up the numbers `begin` to `end` of a tensor (n,) or (n, h)."""
    columns = math.prod(shape[1:])
    while begin < end:
        row, column = divmod(begin, columns)
        rows = 0 if column else (end - begin) // columns
        size = (rows, columns) if rows else (1, min(columns - column, end - begin))
        yield torch.Size((row, column)[: len(shape)]), torch.Size(size[: len(shape)])
        begin += math.prod(size)


def own_boxes(model: LlamaForCausalLM, reducer: Reducer, share: bool = False) -> list[OwnBoxes]:
    """What this rank trains of each parameter, if anything. A `share`: of what several ranks train, each has a part."""
    modules, found = sharded_modules(model), []
    rank, size = 0, 1
    if share and reducer.replicas:
        rank, size = dist.get_rank(reducer.replicas), dist.get_world_size(reducer.replicas)
    for name, p in model.named_parameters():
        trained, begin = reducer.trained_of(p)
        if trained is None:
            continue
        n, shape, corner = trained.numel(), p.shape, (0,) * p.ndim
        part = slice(n * rank // size, n * (rank + 1) // size)
        if part.start == part.stop:
            continue
        if name in modules:
            shape = modules[name].full_shape[: p.ndim]
            # Of the numbers of the whole, the first one in this rank's shard.
            first = modules[name].shard_of(torch.empty(shape, device="meta")).storage_offset()
            corner = divmod(first, math.prod(shape[1:]))[: p.ndim]
        boxes = [
            (torch.Size(map(sum, zip(corner, offset, strict=True))), box)
            for offset, box in range_boxes(p.shape, begin + part.start, begin + part.stop)
        ]
        found.append(OwnBoxes(name, shape, trained, part, boxes))
    return found
