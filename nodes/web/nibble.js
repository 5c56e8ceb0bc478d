// Shows on a node of Nibble what it says when it has run: a verdict in a colour and a word, or a few lines.

import { app } from "../../scripts/app.js";

const WIDGET = "nibble_said";
const MOST = 260; // pixels; what is longer scrolls
// White on each of them has a contrast of 5.0 or more, on a dark node and on a light one.
const COLOURS = { green: "#1a7a34", amber: "#8f5600", red: "#b3261e" };
const FORM = {
  height: "100%",
  boxSizing: "border-box",
  overflow: "auto",
  padding: "6px 8px",
  borderRadius: "6px",
  background: "var(--comfy-input-bg)",
  color: "var(--input-text)",
  font: "12px/1.45 system-ui, sans-serif",
  overflowWrap: "anywhere",
  userSelect: "text",
};

function element(tag, text, style = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  Object.assign(made.style, style);
  return made;
}

function badge(word, level) {
  return element("strong", word, {
    display: "inline-block",
    marginRight: "6px",
    padding: "0 8px",
    borderRadius: "4px",
    background: COLOURS[level],
    color: "#fff",
  });
}

// The first line of a verdict is "Word: sentence".
function fill(box, text, level) {
  const [first, ...rest] = text.split("\n");
  const [, word, sentence] = (level && first.match(/^(\w+): (.*)$/)) || [null, "", first];
  const head = element("div", "", { fontWeight: rest.length ? "600" : "400" });
  if (word) head.append(badge(word, level));
  head.append(sentence);
  box.replaceChildren(head, ...rest.map((line) => element("div", line, { marginTop: "3px" })));
}

function show(node, text, level) {
  removeProgress(node);
  let widget = node.widgets?.find((w) => w.name === WIDGET);
  if (!widget) {
    const box = element("div", "", FORM);
    box.className = "nibble-said";
    box.setAttribute("role", "status");
    widget = node.addDOMWidget(WIDGET, "nibble", box, {
      serialize: false,
      getMinHeight: () => box.nibbleHeight ?? 60,
      hideOnZoom: false,
    });
    widget.serialize = false;
  }
  const box = widget.element;
  fill(box, text, level);
  // Nodes 2.0 grow with what they hold.
  box.style.maxHeight = window.LiteGraph?.vueNodesMode ? `${MOST}px` : "";
  box.nibbleHeight = Math.min(MOST, 18 * Math.ceil(text.length / 48 + 1)); // until it has been drawn
  // Pictures come under it when they are loaded.
  for (const wait of [0, 300, 1500]) setTimeout(() => fit(node), wait);
}

function fit(node) {
  const box = node.widgets.find((w) => w.name === WIDGET)?.element;
  const needed = [...(box?.children ?? [])].reduce((sum, line) => sum + line.offsetHeight + 3, 14);
  if (box?.offsetHeight) box.nibbleHeight = Math.min(MOST, needed);
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, 300), Math.max(node.size[1], height)]);
  node.setDirtyCanvas?.(true, true);
}

// The text under a bar, such as "After: 8 of 8 steps", is of no use once the node has said what came out.
function removeProgress(node) {
  const text = node.widgets?.find((w) => w.name === "$$node-text-preview");
  if (text) node.removeWidget ? node.removeWidget(text) : node.widgets.splice(node.widgets.indexOf(text), 1);
}

app.registerExtension({
  name: "Nibble",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("Nibble")) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      before?.apply(this, arguments);
      if (message?.text) show(this, message.text.join("\n"), message.nibble_level?.[0]);
    };
  },
});
