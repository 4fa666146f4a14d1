"""``python -m deslo_plugin.cli``, as torchrun starts it."""

from deslo_plugin.cli import main

if __name__ == "__main__":
    main()
