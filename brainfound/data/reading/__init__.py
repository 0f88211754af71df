"""Reading a scan: `archives` open files, `image_file` reads them, `header_geometry` checks affines; `scan` joins them."""
