"""The table of a comparison against the functions that it is made of, and against studies whose outcome is known."""

from __future__ import annotations

import io
import math

import numpy as np
import pandas as pd
import pytest

from brainfound.errors import UsageError
from brainfound.metrics import auroc, mae
from brainfound.metrics.comparison import compare, compare_pairs, score_intervals
from brainfound.metrics.registry import classification_scores, multi_label_scores, task_metrics
from brainfound.metrics.statistics import bootstrap_interval, delong_test, holm, paired_permutation_test

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
    assert list(found.index) == [metric.name for metric in task_metrics("classification")]
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


def segmented(shift, num=13):
    dice = 0.6 + shift + 0.1 * np.sin(np.arange(num))
    dice[:3] = np.nan
    clean = np.where(np.arange(num) < 3, 1.0, np.nan)
    table = {"subject": names(num), "row": range(num), "reference_pixels": np.arange(num), "dice": dice}
    return pd.DataFrame(table | {"clean_negatives": clean})


def test_segmentations_are_compared_where_there_is_something():
    found = compare({"a": segmented(0.1), "b": segmented(0.0)}, "b", num_resamples=50, num_permutations=1100)
    row = found[(found["metric"] == "dice") & (found["system"] == "a")].iloc[0]
    assert row["difference"] == pytest.approx(0.1)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((0.1, 0.1))
    assert row["num_cases"] == 10
    assert row["p"] == pytest.approx(2 / 2**10)
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


def test_dice_of_regions_is_the_mean_over_regions_as_in_the_scores():
    whole, core = np.array([0.5, 0.7, np.nan]), np.array([0.9, np.nan, np.nan])
    cases = pd.DataFrame({"subject": names(3), "dice(whole)": whole, "dice(core)": core, "dice": [0.7, 0.7, np.nan]})
    found = score_intervals(cases, num_resamples=20).set_index("metric")
    assert found.loc["dice", "value"] == pytest.approx((0.6 + 0.9) / 2)
    assert found.loc["dice", "num_cases"] == 2
    assert found.loc["dice(core)", "value"] == 0.9
    better = compare({"a": cases.assign(**{"dice(core)": core + 0.05}), "b": cases}, "b", ["dice"], **FEW)
    assert better.iloc[1]["difference"] == pytest.approx(0.025)


def several_labels(strength, seed, num=40):
    generator = np.random.default_rng(seed)
    table = pd.DataFrame({"subject": names(num), "row": range(num)})
    for k, name in enumerate(("edema", "lesion")):
        truth = np.arange(num) // (k + 1) % 2
        table[f"truth({name})"] = truth
        table[f"p({name})"] = 1 / (1 + np.exp(-strength * (truth - 0.5) - generator.normal(size=num)))
    return table


def test_several_labels_per_case_are_scored_by_their_mean():
    cases, better = several_labels(0.3, 0), several_labels(4.0, 1)
    found = score_intervals(cases, num_resamples=30).set_index("metric")
    columns = [[f"{kind}({name})" for name in ("edema", "lesion")] for kind in ("truth", "p")]
    expected = multi_label_scores(cases[columns[0]], cases[columns[1]], ("edema", "lesion"))
    assert found["value"].to_dict() == pytest.approx({name: expected[name] for name in found.index})
    row = compare({"a": better, "b": cases}, "b", ["auroc"], **FEW).iloc[1]
    assert row["p"] < 0.05
    assert math.isnan(row["p_delong"])
    with pytest.raises(UsageError, match=r"truth\(lesion\)"):
        score_intervals(cases.drop(columns="truth(lesion)"))
    with pytest.raises(UsageError, match="0 or 1"):
        score_intervals(cases.assign(**{"truth(lesion)": 2}))


def test_the_score_of_several_runs_is_their_mean():
    runs, base = [aged(8, k) for k in (1, 2, 3)], [aged(8, k) for k in (4, 5, 6)]
    found = compare({"a": runs, "b": base}, "b", ["mae"], **FEW)
    means = [np.mean([mae(t["truth"], t["prediction"]) for t in tables]) for tables in (base, runs)]
    assert found["value"].tolist() == pytest.approx(means)
    assert found["difference"].iloc[1] == pytest.approx(means[1] - means[0])
    assert score_intervals(runs, ["mae"], num_resamples=60)["low"][0] == pytest.approx(found["low"].iloc[1])
    # Three times the same run is that run, in the interval and in the test.
    alone = compare({"a": runs[0], "b": base[0]}, "b", ["mae", "r2"], **FEW)
    thrice = compare({"a": [runs[0]] * 3, "b": [base[0]] * 3}, "b", ["mae", "r2"], **FEW)
    mixed = compare({"a": runs[0], "b": [base[0]] * 3}, "b", ["mae", "r2"], **FEW)
    pd.testing.assert_frame_equal(thrice, alone)
    pd.testing.assert_frame_equal(mixed, alone)
    with pytest.raises(UsageError, match="different numbers of seeds"):
        compare({"a": runs, "b": base[:2]}, "b", **FEW)
    with pytest.raises(UsageError, match="not the cases of its first run"):
        score_intervals([runs[0], runs[1].iloc[1:]])
    classes = [classified(1.0, k) for k in (0, 1)]
    assert score_intervals(classes, ["auroc"], num_resamples=20)["value"][0] == pytest.approx(
        np.mean([score_intervals(c, ["auroc"], num_resamples=20)["value"][0] for c in classes])
    )
    masks = compare({"a": [segmented(0.1), segmented(0.2)], "b": [segmented(0.0)] * 2}, "b", ["dice"], **FEW)
    assert masks["difference"].iloc[1] == pytest.approx(0.15)
    assert masks["num_cases"].iloc[1] == 10


def test_pairs_are_the_single_comparisons_corrected_together():
    systems = {"a": aged(12, 0), "b": aged(9, 1), "c": aged(3, 2)}
    found = compare_pairs(systems, ["mae", "r2"], **FEW)
    assert found["system"].tolist() == ["b", "c", "c"] * 2
    assert found["against"].tolist() == ["a", "a", "b"] * 2
    for row in found.itertuples():
        single = compare(systems, row.against, [row.metric], **FEW).set_index("system").loc[row.system]
        assert (row.difference, row.p) == pytest.approx((single["difference"], single["p"]))
        assert row.difference_low == pytest.approx(single["difference_low"])
        assert row.num_subjects == 40
    for _, of_metric in found.groupby("metric"):
        assert of_metric["p_holm"].to_numpy() == pytest.approx(holm(of_metric["p"]))
    with pytest.raises(UsageError, match="not the cases of a"):
        compare_pairs({"a": aged(1, 0), "b": aged(1, 0).iloc[1:]}, **FEW)


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
        (lambda t: t.drop(columns=["p(ill)", "p(well)"]), "the cases have no scores"),
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
