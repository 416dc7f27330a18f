"""``memlib book``: execute the chapters that changed and build the site."""

import os

from memlib.paths import ROOT
from memlib.site.book import build


def book(options) -> None:
    here = os.getcwd()  # two chapters beside each other may leave another folder behind
    site = build(ROOT, options.profile, options.set, options.model or "", options.fresh)
    print(os.path.relpath(site / "index.html", here))
