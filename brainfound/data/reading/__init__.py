"""Reading a scan: `archives` open files, `image_file` reads, `header_geometry` checks affines, `scan` joins them."""
