"""The summary of rows of logits on a GPU, by two Triton kernels that read them once.

The first kernel reads each row. It sums the exponentials, counts the logits that reach a given one,
and writes the largest logit of every group of neighbours. The k-th largest of these is a bound that
each of the top k reaches, and k groups hold them. The second kernel reads those groups alone, some
5 % of a row, keeps the logits that reach the bound, seldom many more than k, and finds the top k
among these. Of equal logits it takes those with the smaller ids, also where most are equal.

A logit is compared by its key, an unsigned integer in the same order. The k-th largest key of a
list is found bit by bit: each bit takes one count of the keys.

n rows, W logits of a row, k the size of the top k, K the next power of two. This module needs
triton. Its interpreter runs the kernels on a CPU.
"""

from functools import partial

# pyright: reportMissingImports=false, reportIndexIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

DEVICES = ("cpu",) if triton.knobs.runtime.interpret else ("cuda",)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_TOP_K = 512
_CANDIDATES, _MOST_GROUP = 8192, 128  # logits that are read again, and of a group
_BLOCK, _WARPS = 2048, 8  # the fastest of those tried on an H200, as the next two
_CHUNK, _SELECT_WARPS = 512, 4
_SKIPPED = {torch.bfloat16: 16}  # bits of a key that say nothing


def summarise(
    logits_nW: Tensor,
    at_least_n: Tensor,
    top_k: int,
    *,
    most_group: int = _MOST_GROUP,
    block: int = _BLOCK,
    warps: int = _WARPS,
    chunk: int = _CHUNK,
    select_warps: int = _SELECT_WARPS,
) -> tuple[Tensor, ...]:
    """Return the fields of a `Summary`, with at most `MOST_TOP_K` of the logits."""
    n, W = logits_nW.shape
    assert 0 < top_k <= min(W, MOST_TOP_K)
    assert logits_nW.stride(1) == 1
    K = triton.next_power_of_2(top_k)
    group = min(most_group, _CANDIDATES // K)
    groups = triton.cdiv(W, group)
    floats = partial(torch.empty, dtype=torch.float32, device=logits_nW.device)
    integers = partial(torch.empty, dtype=torch.int32, device=logits_nW.device)
    found = floats(n), floats(n), integers(n), floats(n, top_k), integers(n, top_k)
    maxima_nG = floats(n, groups)
    rows = logits_nW, logits_nW.stride(0), W
    if n:
        _read_kernel[(n,)](
            *rows, at_least_n.float().contiguous(), *found[:3], maxima_nG, groups,
            BLOCK=block, GROUP=group, num_warps=warps,
        )  # fmt: skip
        _select_kernel[(n,)](
            *rows, maxima_nG, groups, integers(n, top_k),
            floats(n, top_k * group), integers(n, top_k * group), *found[3:],
            TOP_K=top_k, K=K, GROUP=group, SKIPPED=_SKIPPED.get(logits_nW.dtype, 0), CHUNK=chunk,
            num_warps=select_warps,
        )  # fmt: skip
    return found


@triton.jit
def _read_kernel(
    logits, stride, size, at_least,  # [n, W], its stride, W, [n]
    highest, sums, counts, maxima, groups,  # [n] three times, [n, groups], groups of a row
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    least = tl.load(at_least + n)
    ROWS: tl.constexpr = BLOCK // GROUP
    group = tl.arange(0, ROWS)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    # of each lane alone: nothing waits for other lanes inside the loop
    top = tl.full([ROWS, GROUP], -3.4e38, tl.float32)
    total = tl.zeros([ROWS, GROUP], tl.float32)
    count = tl.zeros([ROWS, GROUP], tl.int32)
    for start in range(0, size, BLOCK):
        is_inside = start + at < size
        z = tl.load(row + start + at, mask=is_inside, other=-float("inf")).to(tl.float32)
        less = tl.exp(-tl.abs(z - top))
        total = tl.where(z > top, total * less + 1, total + less)
        top = tl.maximum(top, z)
        count += (is_inside & (z >= least)).to(tl.int32)
        own = start // GROUP + group
        tl.store(maxima + n * groups + own, tl.max(z, 1), mask=own < groups)
    most = tl.max(top)
    tl.store(highest + n, most)
    tl.store(sums + n, tl.sum(total * tl.exp(top - most)))
    tl.store(counts + n, tl.sum(count))


@triton.jit
def _key(z):
    """An unsigned integer for each logit, in the same order, above 0; −0 is 0."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _logit(key):
    """The logit of a key."""
    bits = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _bound(values, length, count, SKIPPED: tl.constexpr, CHUNK: tl.constexpr):
    """The `count`-th largest key of a list, without its last bits, and how many are larger."""
    lane = tl.arange(0, CHUNK)
    bit = tl.full([], 1 << (31 - SKIPPED), tl.uint32)
    least = tl.zeros([], tl.uint32)
    larger = tl.zeros([], tl.int32)
    for _ in range(32 - SKIPPED):
        reach = tl.zeros([CHUNK], tl.int32)
        for start in range(0, length, CHUNK):
            is_lane = start + lane < length
            key = _key(tl.load(values + start + lane, mask=is_lane, other=0.0)) >> SKIPPED
            reach += (is_lane & (key >= (least | bit))).to(tl.int32)
        reached = tl.sum(reach)
        larger = tl.where(reached < count, reached, larger)
        least = tl.where(reached < count, least, least | bit)
        bit = bit >> 1
    return least, larger


@triton.jit
def _copy_largest(
    values, ids, length, count, to_values, to_ids, SKIPPED: tl.constexpr, CHUNK: tl.constexpr
):
    """Copy the `count` largest of a list in their order, of equal ones the first; returns a bound
    that their keys reach. Without ids, their places are written."""
    lane = tl.arange(0, CHUNK)
    least, larger = _bound(values, length, count, SKIPPED, CHUNK)
    copied = 0
    equals = 0
    for start in range(0, length, CHUNK):
        is_lane = start + lane < length
        z = tl.load(values + start + lane, mask=is_lane, other=0.0)
        key = _key(z) >> SKIPPED
        equal = (is_lane & (key == least)).to(tl.int32)
        is_first = equals + tl.cumsum(equal) <= count - larger
        is_largest = is_lane & ((key > least) | ((equal > 0) & is_first))
        place = copied + tl.cumsum(is_largest.to(tl.int32)) - 1
        if ids is None:
            tl.store(to_ids + place, start + lane, mask=is_largest)
        else:
            id = tl.load(ids + start + lane, mask=is_lane, other=0)
            tl.store(to_ids + place, id, mask=is_largest)
            tl.store(to_values + place, z, mask=is_largest)
        copied += tl.sum(is_largest.to(tl.int32))
        equals += tl.sum(equal)
    tl.debug_barrier()
    return least


@triton.jit
def _select_kernel(
    logits, stride, size, maxima, groups,  # [n, W], its stride, W, [n, groups], groups of a row
    chosen, found_values, found_ids,  # scratch: [n, k], [n, k·GROUP] twice
    values, ids,  # [n, k] twice
    TOP_K: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SKIPPED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    chosen += n * TOP_K
    found_values += n * TOP_K * GROUP
    found_ids += n * TOP_K * GROUP
    values += n * TOP_K
    ids += n * TOP_K

    count = tl.minimum(groups, TOP_K)
    least = _copy_largest(
        maxima + n * groups, None, groups, count, None, chosen, SKIPPED, CHUNK
    )  # fmt: skip
    least = tl.where(groups < TOP_K, 0, least)
    found = 0
    for start in range(0, count * GROUP, CHUNK):
        lane = start + tl.arange(0, CHUNK)
        is_lane = lane < count * GROUP
        id = tl.load(chosen + lane // GROUP, mask=is_lane, other=0) * GROUP + lane % GROUP
        is_lane &= id < size
        z = tl.load(logits + n * stride + id, mask=is_lane, other=0.0).to(tl.float32)
        is_found = is_lane & ((_key(z) >> SKIPPED) >= least)
        place = found + tl.cumsum(is_found.to(tl.int32)) - 1
        tl.store(found_values + place, z, mask=is_found)
        tl.store(found_ids + place, id, mask=is_found)
        found += tl.sum(is_found.to(tl.int32))
    tl.debug_barrier()
    _copy_largest(found_values, found_ids, found, TOP_K, values, ids, SKIPPED, CHUNK)
    _sort(values, ids, TOP_K, K)


@triton.jit
def _sort(values, ids, TOP_K: tl.constexpr, K: tl.constexpr):
    """Sort the largest to the front; of equal ones those with the smaller ids."""
    entry = tl.arange(0, K)
    is_entry = entry < TOP_K
    id = tl.load(ids + entry, mask=is_entry, other=0)
    key = tl.where(is_entry, _key(tl.load(values + entry, mask=is_entry, other=0.0)), 0)
    before = (~id).to(tl.uint32, bitcast=True)
    order = tl.sort((key.to(tl.uint64) << 32) | before.to(tl.uint64), descending=True)
    tl.debug_barrier()  # every entry is read before any is overwritten
    tl.store(ids + entry, ~order.to(tl.uint32).to(tl.int32, bitcast=True), mask=is_entry)
    tl.store(values + entry, _logit((order >> 32).to(tl.uint32)), mask=is_entry)
