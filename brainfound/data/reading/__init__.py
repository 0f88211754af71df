"""Reading a scan: `archives` open files, `image_file` reads them, `orientation` checks affines; `scan` joins them."""
