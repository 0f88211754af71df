"""What the words of a name say: the right contrast or doubt, never another contrast."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from brainfound.data.sources.file_names import parse_filename, read_scan_name
from brainfound.data.sources.words import read_series_text


def contrast(name: str) -> str:
    return read_scan_name(Path(f"{name}.nii.gz")).contrast


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("FLAIR_in_T1 p7_flair_reg_t2w FLAIRtoT1 t2_flair_coreg_t1 flair-space-T1w flair2t1_brain", "FLAIR"),
        ("T1_to_FLAIR p7_T1w_in_T2_space T1w_reg_SWI t1_on_flair", "T1w"),
        ("p7_T2_coreg_T1 T2w_to_T1ce", "T2w"),
        (
            "T1_postcontrast p7_t1_gado T1w_Gd t1_tse_km post_gd_T1 CE-T1 T1+C T1C+ mprage_contrast SPGR_enhanced",
            "T1ce",
        ),
        ("T1_pre_contrast t1_without_gd T1_nativ p7_T1_nonenhanced MPRAGE_noGd T1w_ohne_KM", "T1w"),
        ("t2_tirm_tra_dark-fluid t2-darkfluid-sag t2_spc_da-fl_irprep FLAIR_tirm AX_FLAIR_T2 FLAIR_post", "FLAIR"),
        ("t2_fl2d_hemo T2_FFE t2star T2-GRE gre hemo_ax", "T2starw"),
        ("p7_T1_gre t1_fl3d_tra T1_ffe t1_mpr_sag mp2rage_UNI_Images", "T1w"),
        (
            "T1_map T2_mapping p7_t2star_map SWI_phase T1_pha SWI_mIP T1_pve_1 T2_prob MP2RAGE_INV2 mp2rage_T1_Images",
            "unknown",
        ),
        ("T1_FLAIR p7_T2_T1 PD_and_T2 t2_tirm_cor p7_post_T1 T2_space_FLAIR T1_pre_post", "unknown"),
        ("T2_cspine T1_knee MRA_neck t2_tse_lumbar localizer_T1 bold_rest T1_subtraction STIR", "unknown"),
        ("T1_vor_KM t1_kein_KM T1_sans_gado T1_Post-Op p7_T1_post_surgery", "T1w"),
        ("T1_Kontrastmittel t1_tse_nach_KM MPRAGE_Dotarem", "T1ce"),
        ("CT_to_T1 PET_in_T1 T1_SUB T1_Subtraktion t2_HWS T1_LWS dwi_b0 MP2RAGE_TI1 T1-Karte CTA_angio", "unknown"),
        ("dwi_b1000 trace ep2d_diff_b1000", "DWI"),
        ("adc ADC_map dwi_adc ADC_Karte dADC", "ADC"),
        # Maps, renderings and templates made from a scan.
        (
            "p7_dwi_L1 p7_dwi_kurtosis p7_dwi_FAC p7_T1_difference p7_FLAIR_T2_ratio T1ce_T1 T1_t1c p7_T1_zscore"
            " p7_T1_std p7_T1_qc lh_T1_curv p7_T1_saliency"
            " p7_T1_1InverseWarp p7_T1_CorticalThickness p7_synth_FLAIR p7_T1_template MNI152_T1_1mm phantom_T1"
            " p7_T1_logjac p7_dwi_ivim p7_qsm_from_swi p7_T1_hippocampus p7_T1_GM p7_T1_screenshot p7_tof_vessels"
            " p7_TOF_rot p7_FLAIR_manual p7_T1_fast_bias",
            "unknown",
        ),
        # Marks of SPM, CAT12 and LST before the name of a scan.
        ("c1anna01_T1 rc2p001_T1 mwp1p001_T1 s6mwp1sub_T1 y_p001_T1 iy_anna_T1 ples_lpa_FLAIR", "unknown"),
        ("rT1 wmT1 p7_mT1 p1_T1 c1_T1 p1v2_T1 p2ses1_T1 Y_01_T1 mp2rage p7_T1_MNI152 anna_T1_biascorr", "T1w"),
        # What may say a contrast agent, and what does.
        ("p7_T1_IV p7_T1_CM p7_T1-C T1_C- p7_T1_dyn p7_mp2rage_T1 SWI_mag", "unknown"),
        (
            "T1_con_gadolinio T1_kontrastli T1_po_kontrascie T1wKS T1_apres_injection T1_con_contraste T1+"
            " T1_poscontraste",
            "T1ce",
        ),
        ("T1_w_o_contrast T1_senza_mdc T1_-KM T1_fatsat T1_lesion_filled T1_no_fat_sat", "T1w"),
        ("T2_EG T2_medic T2_etoile T2_gradient_echo", "T2starw"),
        ("T1_fat T2_water T1_BB FLAIR_star FLAIR* tof_veno T2_hals T2_orbits", "unknown"),
    ],
)
def test_words_of_file_names(names, expected):
    assert {name: contrast(name) for name in names.split()} == dict.fromkeys(names.split(), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sub-1_acq-postgad_T1w", "T1ce"),
        ("sub-1_acq-mpragePostContrast_T1w", "T1ce"),
        ("sub-1_acq-pregad_T1w", "T1w"),
        ("sub-1_acq-darkFluid_T2w", "unknown"),
        ("sub-1_acq-T1flair_T1w", "T1w"),
        ("sub-1_acq-phase_T2starw", "unknown"),
        ("sub-1_acq-fa8_T1w", "T1w"),
        ("sub-1_space-T1w_FLAIR", "FLAIR"),
        ("sub-1_ce-gd_acq-sag_T1w", "T1ce"),
        ("sub-1_UNIT1", "T1w"),
        ("sub-1_ce-pre_T1w", "T1w"),
        ("sub-1_acq-stir_T2w", "unknown"),
        ("sub-1_acq-T1map_T1w", "unknown"),
        ("sub-1_acq-spine_T2w", "unknown"),
        ("sub-1_acq-b0_dwi", "unknown"),
        ("sub-1_label-GM_T1w", "unknown"),
        ("sub-1_desc-subtraction_T1w", "unknown"),
        ("sub-1_desc-preproc_T1w", "T1w"),
        ("sub-1_acq-R2_T1w", "T1w"),
        ("sub-1_acq-NODDI33DIR_dwi", "DWI"),
    ],
)
def test_entities_of_bids_names(name, expected):
    assert contrast(name) == expected


def test_doubt_names_its_readings():
    assert parse_filename(Path("p7_T1_FLAIR.nii.gz")).reason == "in doubt: T1w or FLAIR"
    assert parse_filename(Path("p7_T1_phase.nii.gz")).reason == "a phase image"
    assert parse_filename(Path("p7_scan.nii.gz")).is_silent


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("lesion_mask", "mask"),
        ("p7_msk", "mask"),
        ("p7_FLAIR_LesionMask", "mask"),
        ("p7_T1_parcellation", "dseg"),
        ("lh.hippoSfLabels-T1.v10", "dseg"),
        ("p7_FLAIR_lesionmap", "mask"),
        ("p7_FLAIR_läsionen", "mask"),
        ("p7_T1_BrainExtractionMask", "brain_mask"),
        ("p7_T1_fast_seg", "dseg"),
        ("p7_T1_deepGM_mask", "gm_mask"),
        ("p7_T1ce_edema", None),
        ("p7_T1_tumor_protocol", None),
        ("p7_T1_claustrum_mask", "claustrum_mask"),
        ("p7_contralesional_mask", "contralesional_mask"),
        ("wm_lesion_mask", "mask"),
        ("gm_mask", "gm_mask"),
        ("ventricles_seg", "ventricle_mask"),
        ("T1_bet_mask", "brain_mask"),
        ("aparc+aseg", "dseg"),
        ("hippocampus_label", "hippocampus_mask"),
    ],
)
def test_label_maps_of_tissues_are_not_lesions(name, column):
    assert parse_filename(Path(f"{name}.nii.gz")).label_column == column


def test_the_stripped_image_of_freesurfer_is_no_label_map():
    assert parse_filename(Path("brainmask.mgz")).label_column is None


def test_a_lesion_comes_before_other_masks():
    names = ("a_mask", "p7_lesion_mask", "mask_1")
    assert min(names, key=lambda name: parse_filename(Path(f"{name}.nii.gz")).order) == "p7_lesion_mask"


CONTRASTS = {
    "T1w": ("T1", "t1w", "MPRAGE", "mp-rage", "t1_mpr", "T1_SPGR", "t1_tfl"),
    "T2w": ("T2", "t2w", "t2_tse", "T2_FSE", "t2_cube"),
    "FLAIR": ("FLAIR", "t2_flair", "T2-FLAIR", "flair_tirm", "t2_tirm_dark-fluid", "t2_spc_da-fl", "darkfluid"),
    "T2starw": ("T2star", "t2_hemo", "t2_fl2d", "T2_FFE", "t2s"),
    "SWI": ("SWI", "swan", "swi_t2star"),
    "DWI": ("DWI", "dwi_b1000", "trace", "ep2d_diff_b1000"),
    "ADC": ("ADC", "adc_map", "dwi_ADC"),
    "MRA": ("TOF", "mra", "tof_angio"),
}
AGENTS = ("post", "gd", "Gado", "postcontrast", "CE", "KM", "contrast", "enhanced", "+C")
NO_AGENTS = ("pre_contrast", "native", "without_gd", "nonenhanced", "nogd")
PLANES = ("", "tra", "sag", "COR", "axial", "ax")
PROTOCOLS = ("", "p2", "iso", "3d", "fs", "caipi", "p2_iso", "norm")
TARGETS = ("to", "in", "on", "reg", "coreg")
IDENTIFIERS = ("", "p001", "P17", "sub-03", "case_12", "1000012", "study-A-07", "HC5", "AB_1234")
VISITS = ("", "v1", "ses-2", "m06", "bl", "2019-03-01", "visit3", "tp2")
REFUSALS = ("phase", "map", "mip", "pve_0", "spine", "neck", "subtraction", "localizer")

NAMES = st.fixed_dictionaries(
    {
        "truth": st.sampled_from(sorted(CONTRASTS)),
        "spelling": st.integers(0, 10),
        "agent": st.sampled_from(("", "", *AGENTS, *NO_AGENTS)),
        "before": st.booleans(),
        "plane": st.sampled_from(PLANES),
        "protocol": st.sampled_from(PROTOCOLS),
        "target": st.sampled_from(("", "", "", *TARGETS)),
        "onto": st.sampled_from(("T1", "t1w", "T2", "FLAIR", "flair", "SWI")),
        "identifier": st.sampled_from(IDENTIFIERS),
        "visit": st.sampled_from(VISITS),
        "refusal": st.sampled_from(("",) * 12 + REFUSALS),
        "separator": st.sampled_from("_-. "),
    }
)


def compose(parts: dict) -> tuple[str, str]:
    """A name, and the contrast that it says."""
    spellings = CONTRASTS[parts["truth"]]
    agent, separator = parts["agent"], parts["separator"]
    early = agent and parts["before"] and agent in AGENTS and agent not in ("post", "+C")
    words = [parts["identifier"], parts["visit"], agent if early else "", spellings[parts["spelling"] % len(spellings)]]
    words += ["" if early else agent, parts["plane"], parts["protocol"], parts["refusal"]]
    words += [parts["target"], parts["onto"]] if parts["target"] else []
    name = separator.join(word.replace("_", separator) for word in words if word)
    truth = "T1ce" if parts["truth"] == "T1w" and agent in AGENTS else parts["truth"]
    is_map = parts["refusal"] == "map" and truth == "ADC"
    return name, "unknown" if parts["refusal"] and not is_map else truth


def assert_never_another_contrast(parts: dict) -> None:
    name, truth = compose(parts)
    found = parse_filename(Path(f"{name}.nii.gz"))
    assert found.contrast in (truth, "unknown"), name
    if truth != "unknown" and found.contrast == "unknown":
        assert found.reason, name
        assert parts["target"] or parts["agent"], f"{name} leaves no doubt, but: {found.reason}"
    assert found.label_column is None, name


@given(NAMES)
@settings(max_examples=1000, deadline=None)
@example(dict(truth="FLAIR", spelling=0, agent="", before=False, plane="", protocol="", target="to", onto="T1",
              identifier="p001", visit="", refusal="", separator="_"))  # fmt: skip
def test_composed_names_never_get_another_contrast(parts):
    assert_never_another_contrast(parts)


@pytest.mark.slow
@given(NAMES)
@settings(max_examples=20_000, deadline=None)
def test_many_composed_names_never_get_another_contrast(parts):
    assert_never_another_contrast(parts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("T1 SAG C+", "T1ce"),
        ("AX T1 -C", "T1w"),
        ("t1_tse_tra vor KM", "T1w"),
        ("T1 Post-Op", "T1w"),
        ("DWI b0", "unknown"),
        ("t2_spc_da-fl_irprep_sag_p2_iso", "FLAIR"),
        ("T2W_FFE", "T2starw"),
        ("Sag T1 FLAIR", "T1w"),
        ("t1_se_cspine_sag", "unknown"),
        ("T2 TSE KNEE", "unknown"),
        ("t2_swi3d Pha_Images", "unknown"),
    ],
)
def test_descriptions_of_series_share_the_table(text, expected):
    assert read_series_text(text).contrast == expected
