"""``deslo``: one command each."""
