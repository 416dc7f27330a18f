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
    app.setup_extension("sphinxext.opengraph")
    config.ogp_site_url = config.html_baseurl
    config.ogp_description_length = 0  # it would be raw LaTeX; pages bring their own description
    # a card for each page, with its title
    config.ogp_social_cards = {
        "image": "_static/social.png", "image_mini": "_static/social.png", "line_color": "#1f4e9c"
    }  # fmt: skip


def all_pages(app, env):
    """Every page is written again when one changed what others show of it.

    That is titles, headings, numbers, labels, citations and definitions; Sphinx alone would write
    those pages that it has read.
    """
    domains = env.domaindata
    shown = [env.titles, env.toctree_includes, env.toc_secnumbers, env.toc_fignumbers]
    shown += [domains["std"]["labels"], domains["std"]["anonlabels"], domains["math"]["objects"]]
    headings = {  # without their lines
        name: [(slug, *told[1:]) for slug, told in page.get("myst_slugs", {}).items()]
        for name, page in env.metadata.items()
    }
    shown = [each.items() for each in [*shown, headings, env.definitions]]
    shown = [sorted(map(repr, each)) for each in [*shown, domains["cite"]["citation_refs"]]]
    before, env.shown = getattr(env, "shown", []), shown
    if env.shown == before:
        return [app.config.root_doc]  # where no page is written, static files are not either
    shutil.rmtree(Path(app.outdir) / "_images", ignore_errors=True)  # cards show titles
    return env.found_docs


def drop_pictures(app, exception):
    """Leave only the pictures that pages show."""
    if exception is None:
        shown = {name for _, name in app.env.images.values()}
        for file in (Path(app.outdir) / "_images").glob("*.*"):
            if file.name not in shown:
                file.unlink()


def write_sitemap(app, exception):
    if exception is None and app.config.html_baseurl:
        base = app.config.html_baseurl.rstrip("/")
        pages = [f"{base}/{name}.html" for name in sorted(app.env.found_docs)]
        (Path(app.outdir) / "sitemap.xml").write_text(
            '<?xml version="1.0" encoding="utf-8"?>\n'
            '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n'
            + "".join(f"<url><loc>{page}</loc></url>\n" for page in pages)
            + "</urlset>\n"
        )


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
    app.connect("env-get-updated", all_pages, priority=900)  # after Sphinx has given numbers
    app.connect("build-finished", drop_pictures)
    app.connect("build-finished", write_sitemap)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", keep_icons)
    app.connect("html-page-context", page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
