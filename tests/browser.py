"""The browser that some tests open. Where there is none, `needs_browser` skips them."""

from __future__ import annotations

import shutil

import pytest
from choreographer.browsers.chromium import Chromium

# None as well where BROWSER_PATH names a file that does not exist
CHROMIUM = shutil.which(Chromium.find_browser(skip_local=False) or "")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium or Chrome on this machine (Debian: apt-get install chromium)",
)
