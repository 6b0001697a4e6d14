"""Released checkpoints that their authors' licence lets us download by default, and where they are.

``docs/weights.md`` has these and all others that we know of.
"""

from typing import Any, NamedTuple

__all__ = ["SOURCES", "Source", "addresses_of", "page_of"]


class Source(NamedTuple):
    """A file on its authors' servers.

    Attributes:
        file: Its name; after a hyphen the head of its SHA-256, where that is known.
        drive_id: Its id on the authors' Google Drive.
        url: Its address on another server, tried last; None for none.
        code: What made it, as ``hub/convert.py --from`` calls that.
        model: The network of ours that it becomes.
        model_kwargs: The arguments of that network that the file does not show.
        error: Top-1 and top-5 error in %, as its authors report them; None if they do not.
        license: Identifier of the licence of its repository.
        repository: Address of the code.
    """

    file: str
    drive_id: str
    url: str | None
    code: str
    model: str
    model_kwargs: dict[str, Any]
    error: str | None
    license: str
    repository: str

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where a program downloads it, https first."""
        drive = f"https://drive.usercontent.google.com/download?id={self.drive_id}&export=download&confirm=t"
        return (drive, self.url) if self.url else (drive,)

    @property
    def page(self) -> str:
        """Where somebody downloads it in a browser."""
        return f"https://drive.google.com/file/d/{self.drive_id}/view"


_FAST_MPN_COV = dict(
    code="fast-mpn-cov", model_kwargs={}, license="mit", repository="https://github.com/jiangtaoxie/fast-MPN-COV"
)
SOURCES: tuple[Source, ...] = (
    Source(
        "mpncovresnet50-15991845.pth",
        "19TWen7p9UDyM0Ueu9Gb22NtouR109C6j",
        "http://jtxie.com/models/mpncovresnet50-15991845.pth",
        model="isqrt_resnet50",
        error="21.71 / 6.13",
        **_FAST_MPN_COV,  # type: ignore[arg-type]
    ),
    Source(
        "mpncovresnet101-ade9737a.pth",
        "1riur7v3rZ7vnrdj2UZ7EBaTKEGSccYwg",
        "http://jtxie.com/models/mpncovresnet101-ade9737a.pth",
        model="isqrt_resnet101",
        error="20.99 / 5.56",
        **_FAST_MPN_COV,  # type: ignore[arg-type]
    ),
    Source(
        "pade_resnet50.pth.tar",
        "1ecVE3EklMgg0uwGTezvkvxDY6UxgEa95",
        None,
        code="fast-mpn-cov",
        model="mpncov_resnet50",
        model_kwargs=dict(last_stride=2),
        error=None,
        license="apache-2.0",
        repository="https://github.com/KingJamesSong/DifferentiableSVD",
    ),
)


def addresses_of(url: str) -> tuple[str, ...]:
    """All addresses of a file that is known by one of them, in the order in which they are tried."""
    return next((source.addresses for source in SOURCES if source.url == url), (url,))


def page_of(url: str) -> str:
    """Where somebody downloads a file in a browser."""
    return next((source.page for source in SOURCES if source.url == url), url)
