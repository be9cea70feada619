"""Arrays in huge pages are arrays like any other."""

import mmap
from pathlib import Path

import pytest
import torch

from outrider.models import huge_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, 4096])
def test_they_are_zero_and_writable_to_the_end(dtype: torch.dtype, rows: int) -> None:
    made = huge_pages.zeros((rows, 3, 512), dtype)
    assert (made.shape, made.dtype, made.is_contiguous()) == ((rows, 3, 512), dtype, True)
    assert not made.any()
    made.fill_(1)
    assert made.sum(dtype=torch.float64) == made.numel()


def test_large_ones_begin_with_a_page() -> None:
    made = [huge_pages.zeros((1024, 1024), torch.float32) for _ in range(3)]
    assert [each.data_ptr() % huge_pages.SIZE for each in made] == [0, 0, 0]


def test_where_the_system_has_huge_pages_it_gives_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not hasattr(mmap, "MADV_HUGEPAGE") or not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent huge pages")
    made = huge_pages.zeros((4 * huge_pages.SIZE,), torch.uint8)
    made.fill_(1)
    assert _kib_in_huge_pages(made.data_ptr()) > 0


def _kib_in_huge_pages(address: int) -> int:
    """Of the mapping that the address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and ":" not in first:
            start, end = (int(each, 16) for each in first.split("-"))
            inside = start <= address < end
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1])
    raise AssertionError(f"no mapping has address {address}")
