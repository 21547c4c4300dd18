"""What all reports share: colours, the style sheet, the frame of a page."""

from __future__ import annotations

import colorsys
import html
from importlib import resources

from demp_fx.channels.groups import Group


def asset(name: str) -> str:
    """The text of a file next to this one."""
    return resources.files("demp_fx.report").joinpath("assets", name).read_text(encoding="utf-8")


def colour(number: int) -> str:
    """A light colour for a group, as "#rrggbb": neighbours in number are far apart in hue."""
    hue = number * 0.618034 % 1.0
    light = (0.80, 0.72, 0.86)[number % 3]
    r, g, b = colorsys.hls_to_rgb(hue, light, 0.62)
    return f"#{round(255 * r):02x}{round(255 * g):02x}{round(255 * b):02x}"


def label_lines(group: Group) -> list[str]:
    """A group in two or three short lines."""
    free = f", {group.removable} can go" if group.removable else ""
    more = len(group.members) - 1
    lines = [group.name, f"{group.size} channels{free}"]
    return [*lines, f"and {more} more axes"] if more > 0 else lines


def page(title: str, body: str, script: str = "", extra_style: str = "") -> str:
    """A page that stands on its own: nothing in it is loaded from anywhere."""
    code = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title>\n<style>{asset('page.css')}{extra_style}</style>"
        f"</head>\n<body>\n{body}\n{code}</body></html>\n"
    )
