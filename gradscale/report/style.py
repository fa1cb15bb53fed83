"""The style of the HTML report, light and dark."""

from __future__ import annotations

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of the runs: Okabe and Ito

CSS = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b646e; --line: #d9dee3; --ground: #ffffff; --tint: #f5f7f9;
  --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6e9; --soft: #9aa4ae; --line: #363c43; --ground: #16191d;
  --tint: #1f2429; --link: #7db8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 2.5rem 1.5rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .35rem; font-weight: 600; }
p { margin: .4rem 0; max-width: 75ch; }
a { color: var(--link); }
.lead, .soft, figcaption { color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 470px), 1fr)); gap: 2.2rem 2.4rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 470px), 1fr)); gap: 1.4rem 2.4rem; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
figure.wide svg { width: auto; max-width: 100%; }
figure svg text { font-family: inherit; }
figcaption { font-size: .9rem; line-height: 1.45; margin-top: .5rem; max-width: 75ch; overflow-wrap: anywhere; }
figcaption p { margin: 0 0 .45rem; } .spectra { margin-top: 1.4rem; }
.scroll { overflow-x: auto; margin: .2rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .65rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { border-bottom: 1.5px solid var(--soft); }
th:first-child, td:first-child { padding-left: 0; } th:last-child, td:last-child { padding-right: 0; }
table.plan { width: 100%; table-layout: fixed; }
table.plan th, table.plan td { text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere; }
table.plan th:first-child { width: 9.5rem; color: var(--soft); font-weight: 500; }
table.plan tr.differs td { font-weight: 600; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }
.legend { font-size: .8rem; color: var(--soft); margin: .35rem 0 0; overflow-wrap: anywhere; max-width: 110ch; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; } .tables > .scroll { max-width: 100%; }
.contents { max-width: none; line-height: 1.9; }
section > dl { margin: 1.6rem 0; } dd p { font-size: .9rem; }
.run { margin: 0; font-size: .9rem; } .block { margin: 0 0 2.4rem; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
pre { background: var(--tint); padding: .8rem 1rem; overflow-x: auto; font-size: .8rem; border-radius: 4px; }
code, .equation { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .875em; }
dt { font-weight: 600; } dd { margin: .15rem 0 0; }
@media print { body { max-width: none; padding: 0; } figure, .block { break-inside: avoid; } }
"""


def swatch(k: int) -> str:
    """The colour of the k-th run, before its name."""
    return f'<span class="swatch" style="background:{COLOURS[k % len(COLOURS)]}"></span>'
