"""Reading images from folders and web servers."""

from pathlib import Path

import pytest
from PIL import Image

from jigsaw_pretrain.formats.images.source import ImageSource, read_ahead
from tests.helpers.prepped import Drawn, Small, run_shards, tree
from tests.helpers.servers import FaultyProxy, file_server


def test_sizes_are_upright_where_exif_is_applied(drawn: Drawn) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (80, 40)).save(drawn.folder / "images" / "a.jpg", exif=exif)
    source = ImageSource(str(drawn.folder / "images"))
    assert source.size("a.jpg", "ignore") == (80, 40) and source.size("a.jpg", "apply") == (40, 80)


@pytest.mark.slow(seconds=2)
def test_images_from_the_web_are_fetched_ahead(small: Small, tmp_path: Path) -> None:
    with file_server(small.images.parent) as url, FaultyProxy(url, latency=0.05) as proxy:
        source = ImageSource(f"{proxy.url}/pictures")
        files = sorted(path.name for path in small.images.iterdir()) * 4
        assert list(read_ahead(source, files)) == [(small.images / file).read_bytes() for file in files]
        assert proxy.most_at_once >= 8
        annotations = f"{proxy.url}/{small.annotations.name}?token=hidden"
        result = run_shards(annotations, f"{proxy.url}/pictures", tmp_path / "out", *small.options)
    assert result.exit_code == 0, result.output
    assert tree(tmp_path / "out") == small.tree
    assert "hidden" not in result.output
