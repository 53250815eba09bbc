"""common/products.py: whoever makes float32 products, they are of the precision that was asked for."""

import pytest
import torch
import torch.nn.functional as F

from common import products
from common.products import NEWER, SWITCHES, exact, float32_products, read_precision, write_precision

CPU = torch.device("cpu")
AMD = {"cpu_name": "AMD EPYC", "avx512_f": True}


def switches() -> list:
    return [read() for read, _ in SWITCHES]


def named() -> list:
    """Those of now, of the precision its older name alone."""
    (precision, *_), *others = switches()
    return [precision, *others]


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_are_of_full_precision_whoever_makes_them(precision):
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.rand(256, 512, generator=draw), torch.rand(128, 512, generator=draw)
    with float32_products(precision, CPU):
        found = F.linear(x, weight)
        if precision == "high" and not exact():
            return  # as little as torch makes of it on such a processor
    wanted = x.double() @ weight.double().t()
    assert (found / wanted - 1).abs().max() < 5e-6  # of bfloat16 some 1e-4, of TF32 2e-5


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_attention_has_the_same_numbers(kind):
    q, k, v = torch.randn(3, 2, 4, 32, 16, generator=torch.Generator().manual_seed(2)).to(kind)
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    with float32_products("highest", CPU):
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert found.dtype == kind
    torch.testing.assert_close(found.double(), wanted, atol=1e-6 if kind == torch.float32 else 0.03, rtol=0)


def test_what_was_switched_is_put_back_also_within_another_and_after_an_error(monkeypatch):
    monkeypatch.setattr(products, "exact", lambda: True)
    before = switches()
    with pytest.raises(ZeroDivisionError), float32_products("highest", CPU):
        assert named() == ["medium", False, True]
        with float32_products("high", CPU, are_small=True):
            assert named() == ["high", *before[1:]]
        with float32_products("high", torch.device("cuda")):
            assert named() == ["high", *before[1:]]
        assert named() == ["medium", False, True]
        raise ZeroDivisionError
    assert switches() == before
    monkeypatch.setattr(products, "exact", lambda: False)
    with float32_products("medium", CPU):
        assert named() == ["medium", *before[1:]]
    assert switches() == before


@pytest.mark.skipif(not NEWER, reason="this torch has no newer names of the precision")
@pytest.mark.parametrize("onednn", [True, False])
def test_a_program_that_has_named_the_precision_of_one_library_finds_it_again(onednn, monkeypatch):
    """After which torch refuses to tell that of all libraries."""
    monkeypatch.setattr(products, "exact", lambda: onednn)
    before = read_precision()
    try:
        for library, others in ((0, "tf32"), (1, "bf16")):
            write_precision("highest", *["ieee"] * len(NEWER))
            NEWER[library].fp32_precision = others
            with pytest.raises(RuntimeError, match="mix of the legacy and new"):
                torch.get_float32_matmul_precision()
            exact.__wrapped__()
            with float32_products("highest", CPU):
                assert torch.get_float32_matmul_precision() == ("medium" if onednn else "highest")
            found = ["ieee", "ieee"]
            found[library] = others
            assert [it.fp32_precision for it in NEWER] == found
    finally:
        write_precision(*before)


@pytest.mark.parametrize("known", [{}, {"cpu_name": "Intel"}, AMD | {"avx512_f": False}, AMD | {"amx_tile": True}],
                         ids=str)
def test_other_processors_keep_to_torchs_choice(known, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert not exact.__wrapped__()


def test_a_processor_that_would_be_taken_at_its_word_must_prove_it(monkeypatch):
    """What its products come to decides, not its name."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD, raising=False)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.mm(a.bfloat16(), b.bfloat16()).float())
    before = torch.get_float32_matmul_precision()
    assert not exact.__wrapped__() and torch.get_float32_matmul_precision() == before
