"""The table of a comparison against the functions that it is made of, and against studies whose outcome is known."""

from __future__ import annotations

import io
import math

import numpy as np
import pandas as pd
import pytest

from brainfound.errors import UsageError
from brainfound.evaluate import comparison
from brainfound.evaluate.comparison import compare, score_intervals
from brainfound.evaluate.delong import delong_test
from brainfound.evaluate.metrics import auroc, mae
from brainfound.evaluate.scores import HIGHER_IS_BETTER, METRICS, classification_scores
from brainfound.evaluate.statistics import bootstrap_interval, holm, paired_permutation_test

FEW = {"num_resamples": 60, "num_permutations": 120}


def names(num):
    return [f"s{i:02}" for i in range(num)]


def classified(strength, seed, num=40, sessions=1):
    """Cases of two classes; the truth is the same whatever the seed."""
    ill = np.arange(num) % 2
    score = strength * ill + np.random.default_rng(seed).normal(size=num)
    probability = 1 / (1 + np.exp(-score))
    table = pd.DataFrame({"subject": names(num), "session": "a", "truth": np.where(ill, "ill", "well")})
    table = table.assign(**{"p(well)": 1 - probability, "p(ill)": probability})
    return pd.concat([table.assign(session=str(k)) for k in range(sessions)], ignore_index=True)


def aged(error, seed, num=40):
    age = np.linspace(20, 80, num)
    guess = age + np.random.default_rng(seed).normal(0, error, num)
    return pd.DataFrame({"subject": names(num), "row": np.arange(num), "truth": age, "prediction": guess})


def test_intervals_are_those_of_the_bootstrap():
    cases = classified(1.0, 0)
    found = score_intervals(cases, num_resamples=60, seed=3).set_index("metric")
    assert list(found.index) == list(METRICS["classification"])
    truth = (cases["truth"] == "ill").to_numpy().astype(int)
    probabilities = cases[["p(well)", "p(ill)"]].to_numpy()
    assert found["value"].to_dict() == pytest.approx(classification_scores(truth, probabilities))
    expected = bootstrap_interval(auroc, truth, probabilities, subjects=cases["subject"], num_resamples=60, seed=3)
    assert tuple(found.loc["auroc", ["low", "high"]]) == pytest.approx((expected.low, expected.high))
    assert set(found["num_cases"]) == set(found["num_subjects"]) == {40}


def test_order_of_rows_does_not_matter_and_a_file_is_read_as_it_was_written():
    cases = classified(1.0, 0)
    found = score_intervals(cases, ["auroc"], num_resamples=60)
    pd.testing.assert_frame_equal(score_intervals(cases[::-1], ["auroc"], num_resamples=60), found)
    # Class names that are numbers come back from a file as numbers.
    numbered = cases.rename(columns={"p(well)": "p(0)", "p(ill)": "p(1)"}).replace({"well": "0", "ill": "1"})
    file = io.StringIO(numbered.to_csv(sep="\t", index=False))
    pd.testing.assert_frame_equal(score_intervals(pd.read_csv(file, sep="\t"), ["auroc"], num_resamples=60), found)


def test_comparison_of_ages():
    base, better = aged(12, 0), aged(4, 1)
    found = compare({"better": better, "base": base}, "base", ["mae", "r2"], **FEW)
    assert found["system"].tolist() == ["base", "better"] * 2
    assert found["metric"].tolist() == ["mae", "mae", "r2", "r2"]
    row = found.iloc[1]
    assert row["value"] == pytest.approx(mae(better["truth"], better["prediction"]))
    difference = row["value"] - mae(base["truth"], base["prediction"])
    assert row["difference"] == pytest.approx(difference)
    drawn = bootstrap_interval(
        lambda t, a, b: mae(t, a) - mae(t, b),
        *(better["truth"], better["prediction"], base["prediction"]),
        num_resamples=60,
    )
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((drawn.low, drawn.high))
    truth = better["truth"].to_numpy()
    p = paired_permutation_test(
        better["prediction"].to_numpy(), base["prediction"].to_numpy(), lambda x: mae(truth, x), 120
    )
    assert row["p"] == row["p_holm"] == p == pytest.approx(1 / 121)
    assert math.isnan(row["p_delong"])
    assert not row["higher_is_better"]
    assert found.iloc[0][["difference", "p", "p_holm"]].isna().all()
    assert found.iloc[0]["low"] < found.iloc[0]["value"] < found.iloc[0]["high"]


def test_holm_corrects_over_systems_metric_by_metric():
    systems = {"base": classified(0.5, 0)} | {str(k): classified(0.5 + 0.4 * k, k) for k in (1, 2, 3)}
    found = compare(systems, "base", ["auroc", "mcc"], **FEW)
    for metric, of_metric in found.groupby("metric"):
        others = of_metric[of_metric["system"] != "base"]
        assert others["p_holm"].to_numpy() == pytest.approx(holm(others["p"])), metric
        assert (others["p_holm"] >= others["p"]).all()
    of_auroc = found[(found["metric"] == "auroc") & (found["system"] != "base")]
    assert of_auroc["p_delong_holm"].to_numpy() == pytest.approx(holm(of_auroc["p_delong"]))
    labels = (systems["1"]["truth"] == "ill").to_numpy()
    expected = delong_test(labels, systems["1"]["p(ill)"], systems["base"]["p(ill)"]).p
    assert of_auroc["p_delong"].iloc[0] == pytest.approx(expected)
    assert found[found["metric"] == "mcc"]["p_delong"].isna().all()


def test_the_scale_of_a_score_does_not_change_the_test_of_its_order():
    base, other = classified(0.3, 0), classified(1.0, 1)
    squeezed = other.assign(**{"p(ill)": 0.01 * other["p(ill)"]})
    squeezed["p(well)"] = 1 - squeezed["p(ill)"]
    ps = [compare({"a": table, "b": base}, "b", ["auroc", "auprc"], **FEW)["p"] for table in (other, squeezed)]
    pd.testing.assert_series_equal(*ps)
    same = compare({"a": base, "b": base}, "b", **FEW)
    assert (same["difference"].dropna() == 0).all()
    assert (same["p"].dropna() == 1).all()


def test_subjects_are_drawn_and_exchanged_whole():
    once = compare({"a": classified(1.5, 1), "b": classified(0.5, 0)}, "b", ["auroc"], **FEW).iloc[1]
    thrice = compare({"a": classified(1.5, 1, sessions=3), "b": classified(0.5, 0, sessions=3)}, "b", ["auroc"], **FEW)
    for column in ("low", "high", "difference_low", "difference_high", "p"):
        assert thrice.iloc[1][column] == pytest.approx(once[column]), column
    # DeLong takes cases for independent, which three sessions of a subject are not.
    assert not math.isnan(once["p_delong"])
    assert math.isnan(thrice.iloc[1]["p_delong"])
    assert (thrice["num_cases"] == 120).all()
    assert (thrice["num_subjects"] == 40).all()


def segmented(shift, num=12):
    dice = 0.6 + shift + 0.1 * np.sin(np.arange(num))
    dice[:3] = np.nan
    clean = np.where(np.arange(num) < 3, 1.0, np.nan)
    table = {"subject": names(num), "row": range(num), "reference_pixels": np.arange(num), "dice": dice}
    return pd.DataFrame(table | {"clean_negatives": clean})


def test_segmentations_are_compared_where_there_is_something():
    found = compare({"a": segmented(0.1), "b": segmented(0.0)}, "b", num_resamples=50, num_permutations=600)
    row = found[(found["metric"] == "dice") & (found["system"] == "a")].iloc[0]
    assert row["difference"] == pytest.approx(0.1)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((0.1, 0.1))
    assert row["num_cases"] == 9
    assert row["p"] == pytest.approx(2 / 2**9)
    clean = found[(found["metric"] == "clean_negatives") & (found["system"] == "a")].iloc[0]
    assert (clean["num_cases"], clean["difference"], clean["p"]) == (3, 0.0, 1.0)
    assert clean["higher_is_better"]
    other = segmented(0.1).assign(dice=lambda table: table["dice"].fillna(0.5))
    with pytest.raises(UsageError, match="same masks"):
        compare({"a": other, "b": segmented(0.0)}, "b", **FEW)


def test_regions_have_columns_of_their_own():
    cases = segmented(0.0).assign(**{"dice(core)": 0.5, "volume_error_mm3(core)": 10.0})
    found = compare({"a": cases.assign(**{"dice(core)": 0.7}), "b": cases}, "b", **FEW).set_index(["metric", "system"])
    assert found.loc[("dice(core)", "a"), "difference"] == pytest.approx(0.2)
    assert found.loc[("dice(core)", "a"), "higher_is_better"]
    assert not found.loc[("volume_error_mm3(core)", "b"), "higher_is_better"]


def test_several_labels_per_case_are_compared_one_at_a_time():
    cases = classified(1.0, 0).rename(columns={"truth": "truth(ill)"})
    with pytest.raises(UsageError, match="one at a time"):
        score_intervals(cases)


def test_what_has_no_score_is_nan_and_stops_nothing():
    cases = classified(1.0, 0).assign(truth="ill")
    found = score_intervals(cases, num_resamples=20).set_index("metric")
    assert found.loc[["auroc", "auprc", "mcc"], ["value", "low", "high"]].isna().all(axis=None)
    assert 0 < found.loc["balanced_accuracy", "value"] < 1
    table = compare({"a": cases, "b": cases}, "b", ["auroc"], **FEW)
    assert table[["value", "difference", "p", "p_holm", "p_delong"]].isna().all(axis=None)


def test_three_classes():
    generator = np.random.default_rng(0)
    truth = np.arange(30) % 3
    table = pd.DataFrame({"subject": names(30), "truth": np.array(["a", "b", "c"])[truth]})
    tables = []
    for sharpness in (0.0, 3.0):
        weights = np.exp(sharpness * np.eye(3)[truth] + generator.normal(size=(30, 3)))
        shares = weights / weights.sum(axis=1, keepdims=True)
        tables.append(table.assign(**{f"p({name})": shares[:, k] for k, name in enumerate("abc")}))
    found = compare({"base": tables[0], "sharp": tables[1]}, "base", ["auroc"], **FEW)
    assert found["p"].iloc[1] < 0.05
    assert math.isnan(found["p_delong"].iloc[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="subject"), "subject"),
        (lambda t: t.drop(columns="truth"), "truth"),
        (lambda t: t.iloc[:0], "no cases"),
        (lambda t: t.drop(columns=["p(ill)", "p(well)"]), "nothing of the cases is scored"),
        (lambda t: t.assign(truth="dead"), "dead"),
        (lambda t: t.assign(truth=None), "missing"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "twice"),
        (lambda t: t.assign(**{"p(ill)": np.nan}), "not finite"),
        (lambda t: t.assign(**{"p(ill)": "high"}), "not finite"),
        (lambda t: t.assign(subject=[None, *t["subject"][1:]]), "no name"),
        (lambda t: t.iloc[1:], "not the cases of base"),
        (lambda t: t.drop(columns="session"), "not the cases of base"),
        (lambda t: t.assign(truth=t["truth"][::-1].to_numpy()), "not the truth of base"),
        (lambda t: aged(3, 0), "different tasks"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(change, message):
    cases = classified(1.0, 0)
    with pytest.raises(UsageError, match=message) as error:
        compare({"base": cases, "other": change(cases)}, "base", **FEW)
    assert "\n" not in str(error.value)
    assert "other" in str(error.value)


def test_unknown_names_are_answered_with_the_nearest():
    cases = classified(1.0, 0)
    with pytest.raises(UsageError, match="Did you mean auroc"):
        score_intervals(cases, ["auroq"])
    with pytest.raises(UsageError, match="Did you mean base"):
        compare({"base": cases}, "bass")
    with pytest.raises(UsageError, match="of a regression"):
        compare({"a": aged(1, 0), "b": aged(1, 0)}, "b", ["dice"])


def test_every_metric_of_a_table_has_a_direction():
    assert set(comparison._OF_RANKS) <= set(METRICS["classification"])
    for metrics in METRICS.values():
        assert set(metrics) <= set(HIGHER_IS_BETTER)
