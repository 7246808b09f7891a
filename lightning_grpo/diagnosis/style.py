"""The style of the page: light and dark as its reader has it, one column on a telephone."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2430; --soft: #5a6675; --edge: #dde2e8;
  --accent: #2563a8; --second: #c2702a; --third: #7a8594;
  --change: #b3261e; --undecided: #8a6100; --keep: #1e7a3c; --note: #5a6675;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161b; --card: #1a2027; --ink: #e4e9ef; --soft: #9aa6b4; --edge: #303943;
    --accent: #6ea8e6; --second: #e09a5a; --third: #76828f;
    --change: #ff8a80; --undecided: #e6bf5a; --keep: #7bd295; --note: #9aa6b4;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 22px; margin: 0 0 2px; }
h2 { font-size: 17px; margin: 32px 0 10px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
p { margin: 0 0 8px; }
.soft, figcaption small { color: var(--soft); }
.path { overflow-wrap: anywhere; }
.card {
  background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 12px 14px;
}
.statement { border-left: 4px solid var(--undecided); margin-top: 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 10px; }
.tiles .card { padding: 10px 12px; }
.tiles b { display: block; font-size: 22px; line-height: 1.25; }
.tiles span { display: block; font-size: 13px; color: var(--soft); }
.advice { display: grid; gap: 8px; }
.advice .card {
  display: grid; grid-template-columns: 92px 150px 1fr; gap: 4px 12px; align-items: baseline;
}
.badge { font-size: 13px; font-weight: 600; }
.change { color: var(--change); } .undecided { color: var(--undecided); }
.keep { color: var(--keep); } .note { color: var(--note); }
.advice details { margin-top: 4px; }
summary { cursor: pointer; }
.advice summary { color: var(--soft); font-size: 13px; }
.names { font-size: 13px; max-height: 180px; overflow: auto; overflow-wrap: anywhere; }
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px;
}
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; }
figcaption small { display: block; font-weight: 400; font-size: 13px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit; }
.bar { fill: var(--accent); } .second { fill: var(--second); } .third { fill: var(--third); }
.grid { stroke: var(--edge); }
.band { fill: var(--accent); fill-opacity: .22; }
.beyond { fill: var(--third); fill-opacity: .2; stroke: var(--third); stroke-dasharray: 4 3; }
.line { fill: none; stroke: var(--accent); stroke-width: 2; } .dot { fill: var(--accent); }
.limit { stroke: var(--soft); stroke-dasharray: 2 3; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; width: 100%; margin-top: 8px; }
th, td { text-align: left; padding: 3px 10px 3px 0; border-bottom: 1px solid var(--edge); }
th { font-weight: 600; color: var(--soft); }
.prompt { margin-bottom: 8px; }
.prompt summary { display: flex; gap: 12px; align-items: baseline; }
.prompt summary > span:first-child { overflow-wrap: anywhere; flex: 1; }
pre {
  margin: 8px 0 0; padding: 8px 10px; background: var(--page); border-radius: 6px; font-size: 13px;
  font-family: ui-monospace, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.reward { font-size: 13px; color: var(--soft); margin: 8px 0 -4px; }
@media (max-width: 640px) {
  main { padding: 16px 12px 32px; }
  .advice .card { grid-template-columns: auto 1fr; }
  .advice .card > :nth-child(3) { grid-column: 1 / -1; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
}
"""
