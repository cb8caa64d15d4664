import pytest
import torch
from tolerance import assert_grad_not_dropped, assert_no_worse_than_torch


def test_a_zeroed_row_is_noticed():
    truth = torch.randn(6, 4, dtype=torch.float64)
    ours = truth.clone()
    assert_grad_not_dropped(ours, truth)
    ours[3] = 0
    with pytest.raises(AssertionError, match=r"rows \[3\]"):
        assert_grad_not_dropped(ours, truth)


def test_an_error_beyond_twice_torchs_is_noticed():
    truth = torch.randn(200, dtype=torch.float64)
    eager = truth.float()
    assert_no_worse_than_torch(eager.clone(), truth, eager)
    with pytest.raises(AssertionError, match="torch's own"):
        assert_no_worse_than_torch(eager + 1e-5, truth, eager)
    with pytest.raises(AssertionError, match="not finite"):
        assert_no_worse_than_torch(eager * torch.nan, truth, eager)
