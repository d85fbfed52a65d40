"""The report page's style sheet: light and dark by the reader's setting, and for paper."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfcfd; --card: #ffffff; --ink: #1c2430; --quiet: #667085; --grid: #e7eaee; --edge: #dfe3e8;
  --series-1: #2563a8; --series-2: #d1632f; --series-3: #0f8a68; --series-4: #8b5cb8; --series-5: #9a7b1c;
  --good: #0b7a59; --bad: #b93a1f; --bar: #b9c6d6; --note: #fff6e5; --note-edge: #f0d9a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161c; --card: #1a2028; --ink: #e6eaf0; --quiet: #98a2b3; --grid: #2a313c; --edge: #2f3743;
    --series-1: #6aa9ea; --series-2: #f0945f; --series-3: #43c59e; --series-4: #b993e0; --series-5: #d3b353;
    --good: #43c59e; --bad: #f08a70; --bar: #3d4b5d; --note: #2c2617; --note-edge: #54471f;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 12px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0 0 12px; letter-spacing: -0.005em; }
h3 { font-size: 15px; margin: 0 0 8px; }
p { margin: 0 0 12px; }
section { margin-top: 44px; }
.kicker { color: var(--quiet); font-size: 13px; letter-spacing: 0.04em; margin-bottom: 6px; }
.lead { font-size: 19px; line-height: 1.45; max-width: 46em; }
.verdict { border-left: 5px solid var(--series-5); background: var(--card); border-radius: 0 10px 10px 0;
  padding: 12px 18px; margin: 0 0 16px; max-width: 60em; }
.verdict b { display: block; font-size: 20px; line-height: 1.3; margin-bottom: 2px; }
.verdict p { margin: 0; overflow-wrap: anywhere; }
.verdict.good { border-color: var(--good); } .verdict.good b { color: var(--good); }
.verdict.bad { border-color: var(--bad); } .verdict.bad b { color: var(--bad); }
.small { color: var(--quiet); font-size: 14px; max-width: 60em; }
.notice { background: var(--note); border: 1px solid var(--note-edge);
  border-radius: 8px; padding: 10px 14px; font-size: 15px; }
.facts { display: flex; flex-wrap: wrap; gap: 12px 36px; margin: 22px 0 0;
  padding: 16px 0; border-top: 1px solid var(--edge);
  border-bottom: 1px solid var(--edge); }
.facts dt { color: var(--quiet); font-size: 13px; }
.facts dd { margin: 0; font-weight: 600; }
table { width: 100%; border-collapse: collapse; margin-bottom: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 10px 14px 10px 0; border-bottom: 1px solid var(--edge); vertical-align: middle; }
thead th { color: var(--quiet); font-weight: 500; font-size: 14px; }
tbody th { font-weight: 500; }
.marks { table-layout: fixed; }
tr.ours th, tr.ours b { font-weight: 700; }
tr.ours .bar i { background: var(--series-1); }
td .bar { display: inline-block; width: calc(100% - 70px); margin-right: 12px; vertical-align: middle; }
@media (max-width: 640px) { td .bar { display: none; } th, td { font-size: 14px; padding-right: 8px; } }
td b { font-weight: 500; }
.bar { height: 10px; background: var(--grid); border-radius: 5px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--bar); border-radius: 5px; }
.bar.wide { margin: 4px 0 10px; }
.bar.wide i { background: var(--series-1); }
.yes { color: var(--good); font-weight: 600; }
.no { color: var(--bad); font-weight: 600; }
.none { color: var(--quiet); }
.card { background: var(--card); border: 1px solid var(--edge);
  border-radius: 10px; padding: 16px 20px; margin-top: 16px; }
.card p:last-child { margin-bottom: 0; }
pre { background: var(--grid); border-radius: 8px; padding: 12px 14px;
  margin: 0 0 12px; overflow-x: auto; font-size: 13.5px;
  line-height: 1.5; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 18px; }
.chart { margin: 0; background: var(--card); border: 1px solid var(--edge);
  border-radius: 10px; padding: 14px 16px 8px; display: flex;
  flex-direction: column; }
.chart figcaption { font-weight: 600; font-size: 15px; margin-bottom: 4px; line-height: 1.35; }
.chart svg { width: 100%; height: auto; display: block; margin-top: auto; }
.legend { display: flex; gap: 18px; font-size: 13px; color: var(--quiet); }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle;
  background: var(--c); }
.s1 { --c: var(--series-1); } .s2 { --c: var(--series-2); } .s3 { --c: var(--series-3); }
.s4 { --c: var(--series-4); } .s5 { --c: var(--series-5); }
svg text { font-family: inherit; fill: var(--quiet); font-size: 12px; }
svg .label { font-size: 12.5px; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--quiet); }
svg .mark { stroke: var(--quiet); stroke-dasharray: 4 4; }
svg .line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .dot { fill: var(--c); }
svg .markname { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
.picture { background: #fff; border: 1px solid var(--edge); border-radius: 10px; padding: 4px; overflow-x: auto; }
.picture img { display: block; width: 100%; height: auto; min-width: 640px; }
.figures { display: flex; flex-wrap: wrap; gap: 14px 44px; margin-bottom: 14px; }
.figures b { display: block; font-size: 26px; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums; }
.figures span { color: var(--quiet); font-size: 14px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(360px, 100%), 1fr)); gap: 8px 40px; }
.plain th, .plain td { padding: 5px 12px 5px 0; font-size: 14px; }
.plain th { color: var(--quiet); font-weight: 400; width: 130px; }
details { border: 1px solid var(--edge); border-radius: 10px; padding: 10px 16px; background: var(--card); }
summary { cursor: pointer; font-weight: 600; font-size: 15px; }
details pre { margin: 12px 0 4px; max-height: 480px; }
@media print { main { max-width: none; padding: 0; } .card, .chart, .picture, tr { break-inside: avoid; } }
""".strip()
