"""The frame and the style of report.html: light, dark and print; no scripts, nothing fetched."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{style}</style></head><body><main>
{body}
</main></body></html>
"""

STYLE = """
:root { color-scheme: light dark; --page:#fbfbfa; --card:#fff; --ink:#1b1c1e; --soft:#63666c; --rule:#e3e4e6;
  --fill:#f3f4f5; --c1:#2a6fdb; --c2:#c2502e; --c3:#1a8a5f; --c4:#8a56c2; --c5:#c48a00; --c6:#cf4a86; --c7:#a3a7ad; --c8:#2aa3b5 }
@media screen and (prefers-color-scheme: dark) { :root { --page:#15171a; --card:#1c1f23; --ink:#e8e9eb;
  --soft:#9ba0a8; --rule:#32363c; --fill:#262a30; --c1:#6ba4f8; --c2:#f08a66; --c3:#4cc596; --c4:#b992ea;
  --c5:#e5b63e; --c6:#f083b4; --c7:#6d727a; --c8:#5cc8d8 } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "DejaVu Sans", sans-serif; font-variant-numeric:tabular-nums }
main { max-width:1180px; margin:0 auto; padding:32px 24px 64px }
h1 { font-size:26px; line-height:1.2; margin:0; overflow-wrap:anywhere }
h2 { font-size:18px; margin:36px 0 4px }
h3 { font-size:14px; margin:0 0 6px }
header p { margin:4px 0 0 }
header p, .note, .role, .score, figcaption span, small, dt { color:var(--soft) }
.note, .score { font-size:13px; margin:4px 0 10px }
.wide { grid-column:1/-1 }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(165px,1fr)); gap:12px; margin:24px 0 4px }
.tiles div, figure, article { background:var(--card); border:1px solid var(--rule); border-radius:8px }
.tiles div { padding:12px 14px; display:flex; flex-direction:column; justify-content:space-between }
dt { font-size:13px; line-height:1.3 }
dd { margin:4px 0 0; font-size:24px; line-height:1.25 }
small { display:block; font-size:12px }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr)); gap:14px;
  margin-top:18px }
figure { margin:0; padding:12px 14px 8px; break-inside:avoid }
figcaption { font-size:14px; line-height:1.4 }
figcaption span { font-size:13px }
.legend { display:flex; flex-wrap:wrap; gap:2px 14px }
.legend i { display:inline-block; width:10px; height:10px; border-radius:2px; margin-right:5px }
svg { display:block; width:100%; height:auto; margin-top:4px }
.tick { font-size:12px; fill:var(--soft) }
.grid { stroke:var(--rule) }
.axis { stroke:var(--soft) }
.line, .thin { fill:none; stroke-width:2; stroke-linejoin:round }
.thin { stroke-width:1; opacity:.4 }
.band { opacity:.14 }
.hit { fill:transparent }
.hit:hover { fill:var(--soft); opacity:.18 }
article { display:grid; grid-template-columns:1fr 1fr; gap:12px 20px; padding:14px 16px; margin:10px 0 }
article > div { min-width:0 }
pre { margin:0 0 4px; white-space:pre-wrap; overflow-wrap:anywhere; font:13px/1.45 ui-monospace, "SF Mono", Menlo,
  Consolas, "DejaVu Sans Mono", monospace }
.response { background:var(--fill); border-radius:6px; padding:8px 10px; max-height:22em; overflow:auto }
.role { font-size:12px; margin:0 }
table { border-collapse:collapse; font-size:13px; margin:8px 0 }
th, td { text-align:left; padding:4px 18px 4px 0; vertical-align:top; border-bottom:1px solid var(--rule);
  overflow-wrap:anywhere }
th { font-weight:500; color:var(--soft); white-space:nowrap }
summary { cursor:pointer; margin-top:12px }
@media (max-width:640px) { article { grid-template-columns:1fr } }
@media print { main { max-width:none; padding:0 } .charts { grid-template-columns:1fr 1fr } .tick { font-size:15px }
  .response { max-height:none } h2, h3, .note, .role { break-after:avoid } pre, .tiles div { break-inside:avoid } }
"""
