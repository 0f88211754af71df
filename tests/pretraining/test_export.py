"""What an export of pretraining carries: the input contract of the store that it learnt from."""

from __future__ import annotations

from brainfound.data.checking.contract import InputContract


def test_a_pretraining_export_has_the_contract_of_its_store(finished, store):
    contract = InputContract.load(finished / "export")
    assert contract == InputContract.of(store)
    assert contract.num_sessions == len(store)
    assert contract.age_years == (20.0, 75.0)
    assert set(contract.coarsest_mm) == {"T1w", "T2w", "FLAIR"}
