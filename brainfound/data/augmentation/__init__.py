"""Random views of slices for pretraining, made in batches on the device from uint8 pixels.

A view is one random crop, slightly rotated and sheared, with random intensities. What changes a scan without changing
the anatomy is varied (receiver gain, contrast between tissues, bias field, noise, resolution); what would is not: there
is no vertical flip, and left and right are kept unless the recipe asks otherwise. Air stays exactly 0, because
"background is 0" is part of the input contract.

`views_recipe` holds the settings, `multi_crop` makes the views. Of its parts, `crops` says where a view looks,
`contrast_masks` what it shows, and `intensity` how bright it is, with one module for each effect of the scanner:
`bias_field`, `resolution` (blur, thick pixels, Gibbs ringing), `noise`.

Sources: multi-crop (SwAV, arXiv 2006.09882, section 3.2) with the scales of DINOv2; gamma, noise and blur as in common
MRI augmentation (nnU-Net, Isensee et al. 2021, supplementary note 4); those of the single effects are in their modules.
"""

from brainfound.data.augmentation.geometry import random_affine, sample_crops
from brainfound.data.augmentation.intensity import IntensityPlan, vary_intensity
from brainfound.data.augmentation.recipe import IntensityRecipe, ViewsRecipe
from brainfound.data.augmentation.resolution import gaussian_blur
from brainfound.data.augmentation.views import CropViews, MultiCrop, Views, contrast_masks, drop_contrasts

__all__ = [
    "CropViews",
    "IntensityPlan",
    "IntensityRecipe",
    "MultiCrop",
    "Views",
    "ViewsRecipe",
    "contrast_masks",
    "drop_contrasts",
    "gaussian_blur",
    "random_affine",
    "sample_crops",
    "vary_intensity",
]
