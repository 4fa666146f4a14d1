"""The configs that come with the package, by name: ``configs/`` of a checkout, which a wheel carries inside the
package."""

from pathlib import Path

from deslo_plugin.config.reader import did_you_mean
from deslo_plugin.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
# of an installed package, of a checkout, and of the user
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs", Path("configs"))


def find_config(name: str | Path) -> Path:
    """A file, or one of ours by the name of its file: ``"des-loc-adam"``, ``"toy/des-loc"``. Raises ``ConfigError``."""
    if Path(name).is_file():
        return Path(name)
    known = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in FOLDERS
        for path in folder.rglob("*.json")
    }
    asked = Path(name).as_posix().removesuffix(".json").removeprefix("configs/")
    if asked not in known:
        raise ConfigError(
            "--config",
            "an existing file, or a name of one in configs/",
            repr(str(name)),
            did_you_mean(asked, known) or f"check the path, or take one of {', '.join(sorted(known))}",
        )
    return known[asked]
