"""Reading image files that are not trusted: archives, headers, voxels, orientation, and the scan made of them."""
