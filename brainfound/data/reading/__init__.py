"""Reading image files that are not trusted: archives, headers, voxels, orientation. `brainfound.data.scan` uses it."""
