"""Random views of slices, computed in batches on the device from uint8 pixels.

A view is a random crop, slightly rotated and sheared, with random intensities and possibly fewer contrasts. Only
properties of the scan vary (receiver gain, contrast between tissues, bias field, noise, resolution), not the anatomy:
there is no vertical flip, and by default no left-right flip. Air stays exactly 0, as the models' input requires.

Sources: multi-crop of SwAV (arXiv 2006.09882, section 3.2) with the scales of DINOv2; gamma, noise and blur as in
nnU-Net (Isensee et al. 2021, supplementary note 4). The modules name the sources of the other effects.
"""

from brainfound.data.augmentation.intensity import vary_intensity
from brainfound.data.augmentation.recipe import IntensityRecipe, ViewsRecipe
from brainfound.data.augmentation.transforms import random_affine
from brainfound.data.augmentation.views import MultiCrop, Views, drop_contrasts

__all__ = ["IntensityRecipe", "MultiCrop", "Views", "ViewsRecipe", "drop_contrasts", "random_affine", "vary_intensity"]
