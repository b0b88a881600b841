"""Which methods may be averaged under masks."""

from __future__ import annotations

import numpy as np
import pytest

from fedark.foundation.errors import ContractError
from fedark.secagg.exactness import METHODS, check_method


@pytest.mark.parametrize("method", ["ffa-lora", "head", "fed-sb"])
def test_what_is_linear_in_what_travels_passes_without_a_word(method):
    assert check_method(method, "masked") is None
    assert check_method(method, "sealed") is None


def test_plain_lora_runs_with_a_warning_that_names_the_exact_alternative():
    for protection in ("masked", "sealed"):
        assert "ffa-lora" in check_method("lora", protection)


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_methods_that_need_every_customers_factors_are_refused_under_masks_alone(method):
    with pytest.raises(ContractError, match="cannot run under masks"):
        check_method(method, "masked")
    assert check_method(method, "sealed") is None


def test_an_unknown_method_is_refused():
    with pytest.raises(ContractError, match="unknown"):
        check_method("averaging-of-ranks", "masked")


def test_the_rule_is_true_for_the_mean_of_ba():
    """Averaging B alone gives the mean of B A if A is common; averaging A and B apart not."""
    rng = np.random.default_rng(1)
    a = rng.normal(size=(5, 4, 30))
    b = rng.normal(size=(5, 20, 4))
    common = a[0]
    assert METHODS["ffa-lora"].exact
    assert np.allclose(b.mean(0) @ common, np.mean([m @ common for m in b], axis=0))
    assert not METHODS["lora"].exact
    exact = np.mean([m @ n for m, n in zip(b, a, strict=True)], axis=0)
    assert np.linalg.norm(b.mean(0) @ a.mean(0) - exact) > 0.05 * np.linalg.norm(exact)
