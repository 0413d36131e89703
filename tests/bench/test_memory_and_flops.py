"""Peak memory of tensors of known size; FLOPs of operators counted by hand."""

import pytest
import torch
import torch.nn.functional as F

from medarch.bench import flops
from medarch.bench.flops import count_flops, flops_by_operator, register_formula
from medarch.bench.memory import peak_memory

MIB = 2**20


def test_peak_is_the_worst_moment_not_the_sum():
    def work():
        first = torch.ones(MIB)  # 4 MiB
        second = first * 2  # 8 MiB held
        del first
        return torch.ones(3 * MIB), second  # 16 MiB held

    assert peak_memory(work) == 16 * MIB
    assert peak_memory(work) == peak_memory(work)


def test_peak_counts_what_backward_needs():
    weight = torch.ones(257, 513, requires_grad=True)
    size = 257 * 513 * 4
    with torch.no_grad():
        forward = peak_memory(lambda: torch.sigmoid(torch.sigmoid(weight)))
    assert forward == 2 * size

    def train():
        weight.grad = None
        torch.sigmoid(torch.sigmoid(weight)).sum().backward()

    assert peak_memory(train) > 2 * size


def test_tensors_from_before_do_not_count(capfd):
    kept = torch.ones(5 * MIB)
    assert peak_memory(lambda: kept[:7].clone()) < 1024
    assert capfd.readouterr().err == ""


def test_a_failing_function_passes_its_error_on():
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0, warm_up=False)
    assert peak_memory(lambda: torch.ones(MIB)) == 4 * MIB


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda_is_said():
    with pytest.raises(ValueError, match="no CUDA device"):
        peak_memory(lambda: None, device="cuda")
    with pytest.raises(ValueError, match="tpu"):
        peak_memory(lambda: None, device="tpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_on_cuda():
    assert peak_memory(lambda: torch.ones(MIB, device="cuda"), device="cuda") == 4 * MIB


def test_products_by_hand():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert count_flops(torch.mm, a, b) == 210
    assert flops_by_operator(lambda: (a @ b) @ torch.randn(7)) == {"mm": 210, "mv": 2 * 3 * 7}
    assert count_flops(torch.dot, a[0], a[1]) == 2 * 5
    linear = torch.nn.Linear(5, 7)
    x = torch.randn(3, 5, requires_grad=True)
    assert count_flops(lambda: linear(x).sum().backward()) == 3 * 210  # forward, and both gradients


def test_composite_operators_are_taken_apart_in_inference_mode():
    with torch.inference_mode():
        assert count_flops(F.linear, torch.randn(3, 5), torch.randn(7, 5)) == 210


def test_attention_counts_as_its_products_do():
    query = torch.randn(2, 3, 11, 5, requires_grad=True)
    key, value = (torch.randn(2, 3, 13, 5, requires_grad=True) for _ in range(2))
    by_hand = count_flops(lambda: torch.softmax(query @ key.mT, -1) @ value)
    assert by_hand == 2 * 2 * (2 * 3 * 11 * 13 * 5)
    assert count_flops(F.scaled_dot_product_attention, query, key, value) == by_hand
    both = count_flops(lambda: F.scaled_dot_product_attention(query, key, value).sum().backward())
    assert both == by_hand + 5 * (2 * 2 * 3 * 11 * 13 * 5)  # scores anew, and one product for each gradient


def test_grouped_product_counts_as_separate_products_do():
    rows, offsets = [3, 5], torch.tensor([3, 8], dtype=torch.int32)
    x = torch.randn(8, 16, requires_grad=True)
    weight = torch.randn(2, 16, 4, requires_grad=True)

    def separate():
        return torch.cat([part @ matrix for part, matrix in zip(x.split(rows), weight.unbind(), strict=True)])

    def grouped():
        return F.grouped_mm(x, weight, offs=offsets)

    def backward(forward):
        out = forward()
        out.backward(torch.ones_like(out))

    assert count_flops(grouped) == count_flops(separate) == 2 * 8 * 16 * 4
    assert count_flops(backward, grouped) == count_flops(backward, separate) == 3 * 2 * 8 * 16 * 4


def test_grouped_products_of_other_shapes():
    """A batch of matrices against columns that are split into groups, and against a batch."""
    left = torch.randn(2, 3, 16)
    offsets = torch.tensor([8, 24], dtype=torch.int32)
    assert count_flops(F.grouped_mm, left, torch.randn(16, 24), offs=offsets) == 2 * 3 * 16 * 24
    assert count_flops(F.grouped_mm, left, torch.randn(2, 16, 4)) == count_flops(torch.bmm, left, torch.randn(2, 16, 4))


def test_a_norm_is_not_costly():
    x = torch.randn(3, 5)
    assert count_flops(lambda: (x @ x.T).norm()) == 2 * 3 * 5 * 3
    with torch.inference_mode():
        assert count_flops(lambda: torch.linalg.vector_norm(x @ x.T)) == 90


def test_a_costly_operator_without_formula_is_an_error_that_names_it(monkeypatch):
    x = torch.randn(8, 16)
    with pytest.raises(ValueError, match="_fft_r2c"):
        count_flops(lambda: torch.fft.rfft(x @ x.T))
    with pytest.raises(ValueError, match="_trilinear"):
        count_flops(torch.nn.Bilinear(16, 16, 3), x, x)
    monkeypatch.delitem(flops._formulas, "_grouped_mm")
    offsets = torch.tensor([3, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="_grouped_mm"):
        count_flops(F.grouped_mm, x, torch.randn(2, 16, 4), offs=offsets)


def test_a_formula_can_be_registered(monkeypatch):
    monkeypatch.setattr(flops, "_formulas", dict(flops._formulas))

    @register_formula("_fft_r2c")
    def formula(x, *args, out_shape=None, **kwargs):
        return 1000 * x[0] + out_shape[-1]

    assert count_flops(torch.fft.rfft, torch.randn(3, 8)) == 3005
    with pytest.raises(ValueError, match="already"):
        register_formula("_fft_r2c")
    with pytest.raises(ValueError, match="no_such"):
        register_formula("no_such")


def test_a_count_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no operator"):
        count_flops(torch.add, torch.ones(3), 1)
    assert count_flops(torch.mm, torch.ones(0, 5), torch.ones(5, 7)) == 0
