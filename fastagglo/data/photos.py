"""Photographs that ship inside the wheels of scikit-image and scikit-learn: no network needed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastagglo.data.decode import MAX_PIXELS
from fastagglo.data.picture import Picture
from fastagglo.data.source import CachedImages, Source
from fastagglo.errors import UserError, require

if TYPE_CHECKING:
    from PIL.Image import Image

_SKIMAGE, _SKLEARN = ("skimage", "data"), ("sklearn", "datasets/images")

# Name -> (where, file, credit). Left out: drawings and plots, scanned text, the blurred clock, and
# the right picture of the stereo pair, which shows the held-out region of the left one.
_PHOTOS: dict[str, tuple[tuple[str, str], str, str]] = {
    "astronaut": (_SKIMAGE, "astronaut.png", "Eileen Collins, NASA, public domain"),
    "brick": (_SKIMAGE, "brick.png", "CC0Textures, CC0"),
    "camera": (_SKIMAGE, "camera.png", "Lav Varshney, CC0"),
    "chelsea": (_SKIMAGE, "chelsea.png", "Stefan van der Walt, CC0"),
    "china": (
        _SKLEARN,
        "china.jpg",
        "danielbuechele, CC BY 2.0, flickr.com/photos/danielbuechele/6061409035",
    ),
    "coffee": (_SKIMAGE, "coffee.png", "Rachel Michetti, CC0"),
    "coins": (_SKIMAGE, "coins.png", "Brooklyn Museum, no known copyright restrictions"),
    "flower": (
        _SKLEARN,
        "flower.jpg",
        "vultilion, CC BY 2.0, flickr.com/photos/vultilion/6056698931",
    ),
    "grass": (_SKIMAGE, "grass.png", "CC0"),
    "gravel": (_SKIMAGE, "gravel.png", "CC0Textures, CC0"),
    "hubble_deep_field": (_SKIMAGE, "hubble_deep_field.jpg", "NASA, public domain"),
    "ihc": (_SKIMAGE, "ihc.png", "CMMI, no known copyright restrictions"),
    "moon": (_SKIMAGE, "moon.png", "a test picture of scikit-image"),
    "motorcycle": (
        _SKIMAGE,
        "motorcycle_left.png",
        "Middlebury 2014 stereo benchmark, Scharstein et al., GCPR 2014",
    ),
    "retina": (_SKIMAGE, "retina.jpg", "Häggström, WikiJournal of Medicine 2014, CC0"),
    "rocket": (_SKIMAGE, "rocket.jpg", "SpaceX, public domain"),
}

CACHE_BYTES = 64 * 2**20
"""Enough for all of the photographs, decoded (51 MB)."""


class PhotoSource(Source):
    """The built-in photographs: ten colour scenes and six greyscale ones.

    They are far too few to learn a model from; they let a first run work without any download.
    Decoded photographs are kept in memory, 51 MB in all.

    Attributes:
        held_out: four of them, chosen to vary, and each with a distant relative among the rest: a
            person and a texture in grey, an animal and a building in colour.
        credits: who made each one, and its licence. China and flower need the attribution (CC BY
            2.0) wherever they are shown.

    Raises:
        UserError: scikit-image or scikit-learn is missing, or does not ship one of the files.
    """

    held_out = ("camera", "chelsea", "china", "gravel")

    def __init__(self) -> None:
        self.credits = {name: credit for name, (_, _, credit) in _PHOTOS.items()}
        self._files: list[tuple[str, Path]] = []
        for name, ((package, folder), file, _) in _PHOTOS.items():
            path = _package_folder(package) / folder / file
            if not path.is_file():
                raise UserError(
                    f"the built-in photo {name!r} is not in the installed {package} ({path}): "
                    'pip install "fastagglo[demo]", or give data of your own'
                )
            self._files.append((name, path))
        self._cache = CachedImages(CACHE_BYTES)

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        return self._files[index][0]

    def read(self, index: int) -> bytes:
        return self._files[index][1].read_bytes()

    def image(self, index: int, *, max_pixels: int = MAX_PIXELS) -> Image:
        image = self._cache.get(index)
        if image is None or image.width * image.height > max_pixels:
            image = super().picture(index, max_pixels=max_pixels).image()
            self._cache.put(index, image)
        return image

    def picture(self, index: int, *, max_pixels: int = MAX_PIXELS) -> Picture:
        return Picture.of(self.image(index, max_pixels=max_pixels), self._cache.pixels(index))


def _package_folder(package: str) -> Path:
    # Found, not imported: importing scikit-learn takes a second, and scikit-image's own loader
    # would download what it lacks.
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        require(package, extra="demo", purpose="the built-in photos")
        raise UserError(f'{package} is not a package here: pip install "fastagglo[demo]"')
    return Path(spec.submodule_search_locations[0])
