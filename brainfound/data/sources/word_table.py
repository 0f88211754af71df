"""The words of file names, BIDS entities and series descriptions, by what they say of an image: one table.

Words are in lower case. A hyphen stands where a name may be divided: ``dark-fluid`` is found in ``dark_fluid``, in
``Dark Fluid`` and in ``darkfluid``. Of several entries that fit, the longest counts.
"""

from __future__ import annotations

CONTRAST_WORDS = {
    "T1w": "mprage mp-rage memprage spgr fspgr bravo tfl mp2rage t1-weighted uni-images mr-mpr mr-mt1"
    " mpr-n4-anon mpr-1-anon mpr-2-anon mpr-3-anon mpr-4-anon mpr-1-nifti mpr-2-nifti mpr-3-nifti mpr-4-nifti st1w",
    "T1ce": "t1gad t1gado t1wks",
    "T2w": "t2-weighted st2w",
    "FLAIR": "dark-fluid darkfl da-fl t2-fluid",
    "PDw": "proton-density dp",
    "T2starw": "t2-star t2-star-weighted t2-stern t2-etoile mpgr hemoflash",
    "SWI": "susceptibility ven-bold veno-bold swip fsbb bsi",
    "DWI": "tracew ep2d-diff ddwi difusao difusão difuzyon diffusion diffusie diffusione difusion diff resolve b-1000",
    "ADC": "apparent-diffusion average-dc dadc",
    "MRA": "angiography stof s3di-mc-hr 3di-mc-hr",
}
"""Words of a contrast, besides its aliases (`brainfound.contrasts`)."""
AMBIGUOUS_WORDS = {"pd", "md", "fl", "dp"}
"""In a file name, a contrast only after a subject's number: ``PD_001`` is from a study of Parkinson's disease."""

_PLANES = "ax axial tra trans transverse transversal sag sagittal cor coronal obl oblique"
_SEQUENCES = (
    "se tse fse tir spc cube vista brainview blade propeller tfe vibe mpr haste ssfp fiesta ciss epi grase spair"
    " caipi sense grappa fs nofs fatsat fat-sat iso isotropic hires highres lowres thin thick"
)
WORDS = {
    "agent": "post gd gad gado gadolinium gadovist gadavist dotarem magnevist omniscan prohance multihance"
    " clariscan ce km kontrast kontrastmittel contrast contraste enhanced enh nach-km mit-km injecte civ mdc"
    " post-contrast post-gad post-gado post-gd post-ce post-km post-gadolinium with-contrast with-gd with-c"
    " w-contrast"
    " wc plusc plusgd plusgad pluskm apres-injection post-injection apres-iv avec-contraste avec-injection con-mdc"
    " con-contraste con-cte gadolinio kontrastli kontrastlı kontrasli ivkm kontrascie kontraście kontrastem"
    " pos-contraste poscontraste post-contraste",
    "no agent": "pre non no without wo ohne vor kein keine sans avant sin sem senza zonder utan nativ native"
    " pre-contrast pre-gad pre-gado pre-gd pre-ce pre-km no-gd no-gad no-contrast non-contrast non-enhanced"
    " unenhanced"
    " without-contrast wo-contrast w-o w-o-contrast w-o-gd w-o-gad non-ce no-ce",
    "perhaps an agent": "w-wo iv cm with c cte injection dyn dynamic dynamisch dynamique",
    "visit": "post-op pre-op post-surgery pre-surgery post-surgical pre-surgical post-treatment pre-treatment"
    " post-stroke post-ictal",
    "target": "to onto in on reg coreg registered coregistered rigid aligned space",
    "inversion": "ir irprep ir-prep tirm",
    "gradient echo": "gre ffe me2d me3d fl2d fl3d flash hemo haem eg medic merge gradient-echo gradienten-echo"
    " echo-gradient"
    " echo-de-gradient",
    "magnitude": "mag magnitude",
    "protocol": f"{_PLANES} {_SEQUENCES} p2 p3 p4 3d 2d 3t 7t seq sequence series acq wip w weighted norm nd dis2d"
    " dis3d filt uni den uni-den grad-warp b1-correction bias-corrected bias-corr bias-correction"
    " bias-field-corrected std-space to-std to-std-sub std-brain mni152-std mni-std"
    " biasfield-corrected with-skull no-skull skull-stripped skull-strip skull-stripping fat-suppressed"
    " fat-suppression fat-sup fat-supp no-fat-sat water-excitation posterior-fossa lesion-filled lesion-filling",
    "a rendering of vessels": "col rot vr",
    "a map": "map maps karte carte cartes mapa thickness molli symri magic synthetic synth synthsr predicted pred"
    " prediction generated aniso anisotropy odi colfa exponential exp sbref nodif b0 s0 meanb0 mapping mapit t1map"
    " t2map t1-images r1 r2 r2s r2star qt1 qt2 qsm b1 quantitative quant mtr mtsat mwf relaxometry relax relaxation"
    " fieldmap b0map b1map fa eadc cbf cbv mtt ttp tmax rcbv rcbf zscore z-score heatmap probabilistic chi noise"
    " residual residuals 5tt distance dose b-0 ivim uncertainty logjac 5ttvis cortical-thickness std stdev qc curv"
    " curvature sulc saliency",
    "a phase image": "phase phas pha ph imag imaginary real unwrapped",
    "a map of probabilities or tissues": "pve prob probs probability probabilities probmap probseg posterior"
    " posteriors mixeltype origsegs ples",
    "another modality": "ct cta pet fdg amyloid suv suvr dsa oct mrv",
    "a deformation field": "fast-bias brain-bias bias-field field coeff coef biasfield warp inversewarp"
    " inverse-warped"
    " warpfield jac jacobian logjacobian deformation displacement disp",
    "a projection": "mip minip mnip projection projections pjn vrt rotation mpr-range",
    "a subtraction": "sub subtraction subtraktion subtracted substraction minus difference delta ratio divided"
    " dividedby mismatch",
    "one inversion of an MP2RAGE": "inv inv1 inv2 ti1 ti2 first-inversion second-inversion",
    "a localizer": "loc localizer localiser scout survey aahead aascout asset-calibration asset-cal shim calib"
    " calibration",
    "a functional or perfusion series": "bold fmri rest resting asl pasl pcasl perf perfusion dsc dce pwi",
    "no structural contrast": "spectro spectroscopy svs csi mrs screensave screen-save report phoenix cine dixon"
    " mt mtw mton dir stir psir fgatir wmn nm-gre neuromelanin dti tensor flair-star fat water black-blood bb"
    " phase-contrast phasenkontrast"
    " veno venous veineuse venography venogram",
    "a template or phantom": "template template0 atlas phantom acr",
    "an image with a hole": "voided",
    "a picture": "overlay mesh edges edge contour contours kontur rtstruct rtss screenshot render rendering",
    "another part of the body": "hws bws lws rachis lombaire columna orbita orbit orbits knie leber lunge mrcp myelo"
    " spine cspine tspine lspine c-sp t-sp l-sp ls spinal cervical thoracic lumbar sacral neck hals knee shoulder"
    " wrist"
    " ankle elbow foot abdomen abdominal liver kidney prostate prostata pelvis breast heart cardiac chest thorax lung"
    " carotid carotids",
}
"""Words by what they mean; from "a map" on, they say that an image is no scan of the cohort."""


def _words(text: str) -> set[str]:
    return set(text.split())


DIFFUSION_MAPS = _words(
    "l1 l2 l3 v1 v2 v3 mo rd ad mk ak rk ndi ficvf fiso isovf od kurtosis tracts fod wmfod sse fac colorfa outlier"
    " bvals bvecs core"
)
"""Behind the word of a diffusion-weighted scan, these name maps."""
PUBLIC_TEMPLATES = _words("mni152 icbm152 mni305 colin27 fsaverage avg152t1 avg152")
"""As the first words of a name, those of a template; behind a contrast, the space of a scan."""
NO_AGENT_ENTITIES = _words("none no pre without nativ native false 0")
"""Values of ``ce-`` that deny an agent."""

# Words of label maps

LABEL_WORDS = _words(
    "seg segm segs fseg segmentation segmented segmentierung segmentacion mask masks mask1 mask2 mask3 msk maske"
    " masque mascara maschera"
    " masker label labels labelmap gt roi rois dseg pveseg brainmask parcellation parcellated parc annotation"
    " annot gtv"
    " ctv ptv groundtruth truth consensus"
)
LESION_WORDS = _words(
    "lesion lesions laesion läsion laesionen läsionen lésion lésions lesiones lesione lesioni les tumor tumors tumour"
    " tumours wmh wmhs wml lst plaque plaques stroke infarct infarction metastases metastasis"
)
NOT_A_LESION_MAP = _words("filled filling inpainted protocol protokoll study studie clinic unit")
"""Behind the word of a disease: ``tumor_protocol`` and ``lesion_filled`` are scans."""
BRAIN_WORDS = _words("brain bet hdbet synthstrip skullstrip stripped skullstripped head nonbrain")
PARCELLATIONS = _words(
    "aseg aparc wmparc synthseg pveseg firstseg fastseg subcort aal dkt atlas malpem parcellation parcellated parc"
    " schaefer dkt31 dkt25"
    " hipposf hipposflabels brainstemss brainstemsslabels nuclei thalamicnuclei"
)
STRUCTURES = {
    **dict.fromkeys(("gm", "grey", "gray", "greymatter", "graymatter", "deepgm", "dgm"), "gm"),
    **dict.fromkeys(("wm", "white", "whitematter"), "wm"),
    **dict.fromkeys(("ventricle", "ventricles", "vent"), "ventricle"),
    **dict.fromkeys(("hippocampus", "hippocampi", "hipp", "hippo"), "hippocampus"),
    **dict.fromkeys(("vessel", "vessels", "vein", "veins", "artery", "arteries", "vesselness", "vascular"), "vessel"),
    **{"ribbon": "cortex", "oedema": "edema", "et": "enhancing", "ncr": "necrosis"},
    **{
        name: name
        for name in _words(
            "csf thalamus amygdala caudate putamen pallidum puta caud thal pall amyg accu cortex cerebellum brainstem"
            " skull scalp eye eyes tissue tissues matter icv tiv intracranial cerebrum cortical nawm gmwm fov"
            " background healthy normal contralesional contralateral territory air bone face outskin hemispheres"
            " edema enhancing"
            " necrosis"
        )
    },
}
"""Words of what a label map shows that is not a lesion, and the first part of its column."""
LABEL_QUALIFIERS = _words("consensus manual automatic auto expert ground truth final whole core bet hdbet rater")

PROCESSING_WORDS = _words(
    "brain stripped skullstripped ss bet defaced defacing reg registered coreg coregistered bias corrected n4 mni"
    " preproc preprocessed anonymized anonymised norm normalized normalised crop cropped raw orig"
    " original ax axial tra sag sagittal cor"
    " coronal 2d 3d iso 1mm 2mm ras lps unstripped native biascorr biascorrected restore stx pp"
)
"""Words of processing, which say nothing of a subject or a contrast."""
PROCESSING_AFTER_CONTRAST = PUBLIC_TEMPLATES | {"acpc", "dc", "middle"}
"""The same, behind a contrast; before it, they may name a subject."""
IMAGE_WORDS = _words("image img scan volume vol mri brain data nifti")
"""Words that may be all of a file's name, and name nobody."""

# Words of folders

CONTAINER_WORDS = _words(
    "anat brains data dataset derivatives dicom gz hgg images imagestr imagests image img lgg label labels labelstr"
    " labelsts mask masks mr mri nifti niftis nii scans seg segmentations fast first sienax vbm transforms lesions test"
    " testing train training val validation structural volumes files roi rois automated results result output"
    " fsl spm cat12"
)
"""Words of folders that never name a subject."""
FORM_WORDS = _words("image images img imgs nifti niftis nii files volumes structural scans mri mr anat")
"""Those that say nothing of the images in them; one name in two such folders is one subject's."""
DATA_TYPE_WORDS = _words("anat func dwi rest nifti fmap perf swi")
"""Kinds of data, which may have a number inside a subject's folder: ``anat_1``."""
DATA_SET_WORDS = _words(
    "dataset datasets data release challenge trainingdata testdata testingdata validationdata cohort study collection"
    " adni adni1 adni2 adni3 adnigo ppmi aibl ixi oasis oasis1 oasis2 oasis3 oas1 oas2 oas3 abide abidei abideii"
    " abide2 adhd200 fcon1000 corr hcp camcan nfbs lpba40 mindboggle atlas brats miccai msseg msseg2016 isbi isles wmh"
    " mrbrains mrbrains13 mrbrains18 upenn ucsf rembrandt dhcp soop ukb ukbb disc bids"
)
"""Public data sets, and words that call a folder one."""
SCANNER_WORDS = _words(
    "siemens ge philips toshiba canon hitachi uih prisma skyra trio verio vida avanto aera symphony sonata espree"
    " magnetom terra allegra biograph mmr achieva ingenia intera gyroscan signa discovery mr750 mr750w mr450 mr450w hdx"
    " hdxt excite premier architect pioneer artist tesla scanner fit elition vu medical systems healthineers healthcare"
)
SITE_WORDS = _words(
    "utrecht singapore amsterdam ge3t ge1t5 nyu caltech cmu kki leuven maxmun ohsu olin pitt sbl sdsu trinity stanford"
    " ucla um usm yale bni emc eth kul ucd tcd peking washu neuroimage annarbor beijing leipzig newhaven newyork oulu"
    " queensland saintlouis guys iop"
)
"""Sites of public studies of several centres."""
STEP_RANKS = {
    **dict.fromkeys(
        _words(
            "preprocessed preproc preprocess processed pre pp registered reg coregistered coreg resampled skullstripped"
            " stripped corrected biascorrected n4 aligned rigid"
        ),
        0,
    ),
    "": 1,
    **dict.fromkeys(_words("raw rawdata orig original unprocessed native unstripped unregistered source"), 2),
    **{"subj_111": 0, "long": 3, "t88_111": 4},
    **dict.fromkeys(_words("mni mni152 mninonlinear normalized normalised standard stereotaxic talairach warped"), 4),
}
"""Steps of processing that name folders, by preference: scans in register first, then acquired ones, then templates."""
