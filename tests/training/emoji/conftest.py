from pathlib import Path

import pytest

from fewstep.training.emoji import Sprites, load_sprites


@pytest.fixture(scope="session")
def sprites() -> Sprites:
    """Twelve concepts in 3d, flat and noto at 64 px."""
    return load_sprites(Path(__file__).parents[2] / "data" / "emoji")
