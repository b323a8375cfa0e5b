"""Whose pictures and words these are: the notice that goes with everything derived from them."""

from __future__ import annotations

NOTICE = """\
Pictures and words of the fewstep emoji world

Fluent Emoji (3D, flat, color, high contrast)
    Copyright (c) Microsoft Corporation. MIT licence, below.
    By way of @lobehub/fluent-emoji-3d, Copyright (c) 2023 LobeHub, MIT licence,
    and @iconify-json/fluent-emoji, -flat and -high-contrast.
Noto Emoji
    Copyright Google LLC. Apache License 2.0, http://www.apache.org/licenses/LICENSE-2.0
    By way of @iconify-json/noto. Changed: drawn at a fixed size in pixels.
Names and keywords
    emojibase-data, Copyright (c) 2017-2019 Miles Johnson, MIT licence, below.
    emojilib, Copyright (c) 2014 Mu-An Chiou, MIT licence, below.

MIT licence

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

# only for what is made from Twemoji or OpenMoji
ATTRIBUTION = {
    "twemoji": "Twemoji, Copyright 2020 Twitter, Inc and other contributors, CC-BY-4.0, "
    "https://creativecommons.org/licenses/by/4.0/",
    "openmoji": "OpenMoji, by HfG Schwaebisch Gmuend and contributors, CC-BY-SA-4.0, "
    "https://creativecommons.org/licenses/by-sa/4.0/",
}
