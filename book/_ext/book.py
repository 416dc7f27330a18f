"""What the site needs beyond jupyter-book: maths without a network, buttons, clean pages."""

import importlib.metadata
import os
import re
import shutil
from pathlib import Path

MATHJAX = "mathjax/tex-svg.js"  # relative to the built _static; under the source one it would
# be loaded by every page a second time


def configure(app, config):
    """Switch on what depends on the address of the repository."""
    config.mathjax_path = MATHJAX
    url = os.environ.get("BOOK_REPOSITORY", "")
    if not url:
        return
    owner, name = url.split("/")[-2:]
    config.html_baseurl = config.html_baseurl or f"https://{owner.lower()}.github.io/{name}/"
    app.setup_extension("sphinx_sitemap")
    app.setup_extension("sphinxext.opengraph")
    config.sitemap_url_scheme = "{link}"
    config.ogp_site_url = config.html_baseurl
    config.ogp_description_length = 0  # it would be raw LaTeX; pages bring their own description
    # a card for each page, with its title
    config.ogp_social_cards = {
        "image": "_static/social.png", "image_mini": "_static/social.png", "line_color": "#1f4e9c"
    }  # fmt: skip


def copy_mathjax(app, exception):
    if exception is None:
        package = importlib.metadata.distribution("sphinx-mathjax-offline")
        source = next(f for f in package.files if f.name == "tex-svg.js")
        target = Path(app.outdir) / "_static" / MATHJAX
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source.locate(), target)


ICON = re.compile(r'"?([a-z0-9-]+)"?:\[\d+,\d+,\[([^]]*)\],"[0-9a-f]+",(?:"[^"]*"|\[[^]]*\])\],?')


def keep_icons(app, exception):
    """Leave only the icons that pages use in the theme's script, which has two thousand."""
    script = Path(app.outdir) / "_static/scripts/fontawesome.js"
    if exception is not None or not script.exists():
        return
    others = [file for file in script.parent.glob("*.js") if file != script]
    used = set()
    for file in [*Path(app.outdir).glob("*.html"), *others]:
        used |= set(re.findall(r"fa-([a-z0-9-]+)", file.read_text()))

    def kept(match):
        names = {match[1], *re.findall(r"[a-z0-9-]+", match[2])}
        return match[0] if names & used else ""

    script.write_text(ICON.sub(kept, script.read_text()))


def page(app, pagename, templatename, context, doctree):
    """Drop scripts that would ask for a network, and add the buttons that need an address."""
    unwanted = ("thebe", "require.js", "require.min.js")
    for kind in ("script_files", "css_files"):
        context[kind] = [
            file
            for file in context[kind]
            if not any(word in str(getattr(file, "filename", file)) for word in unwanted)
            and "thebe" not in str(getattr(file, "attributes", {}).get("body", ""))
        ]
    url = os.environ.get("BOOK_REPOSITORY", "")
    if not url or doctree is None or "header_buttons" not in context:
        return
    description = re.search('<meta content="([^"]*)" name="description"', context["metatags"])
    if description:
        context["metatags"] += f'<meta property="og:description" content="{description[1]}" />\n'
    owner, name = url.split("/")[-2:]
    buttons = [link("Repository", "fab fa-github", url)]
    if (Path(app.srcdir) / f"{pagename}.ipynb").exists():
        base = f"https://colab.research.google.com/github/{owner}/{name}/blob/gh-pages/notebooks"
        buttons.insert(0, link("Run on Colab", "fas fa-rocket", f"{base}/{pagename}.ipynb"))
        buttons.append(link("Edit", "fas fa-pencil", f"{url}/edit/main/book/{pagename}.md"))
    context["header_buttons"][:0] = buttons


def link(text, icon, url):
    return {
        "type": "link",
        "text": "",
        "url": url,
        "icon": icon,
        "tooltip": text,
        "label": text.lower().replace(" ", "-") + "-button",
    }


def setup(app):
    app.connect("config-inited", configure)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", keep_icons)
    app.connect("html-page-context", page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
