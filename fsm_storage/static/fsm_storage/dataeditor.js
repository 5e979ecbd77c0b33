// Offers an editor with a tree over the text of the data. It is loaded when somebody asks for it; without
// scripts, or when it does not come, the text is there. What is sent is a patch of the keys that were
// edited, with every number as it stands in the text: to JavaScript, 2^53 + 1 would be 2^53.

const place = document.querySelector("[data-fsm-editor]");
const textarea = document.getElementById("id_data_json");
const button = place?.querySelector("button");
let editor = null;
let content = null;

// Strict Content-Security-Policies refuse <style> elements that scripts make. Those of the editor, which all
// go into the head, are given to the document as constructed sheets, which they allow.
const sheets = new Map();

function adopt(style) {
    if (!sheets.has(style)) {
        sheets.set(style, new CSSStyleSheet());
        document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheets.get(style)];
    }
    queueMicrotask(() => sheets.get(style).replaceSync(style.textContent)); // it may get its text after this
    return style;
}

function adoptStyles() {
    const { head } = document;
    const { appendChild, insertBefore } = head;
    head.appendChild = (node) => (node.localName === "style" ? adopt(node) : appendChild.call(head, node));
    head.insertBefore = (node, next) =>
        node.localName === "style" ? adopt(node) : insertBefore.call(head, node, next);
}

function isDark() {
    return getComputedStyle(document.documentElement).colorScheme === "dark";
}

function read(text) {
    return LosslessJSON.parse(text);
}

function isObject(value) {
    return typeof value === "object" && value !== null && !Array.isArray(value) && !value.isLosslessNumber;
}

/** The keys that differ, as JSON, with numbers spelled as they were typed. */
function patchOf(before, after) {
    const text = (value) => LosslessJSON.stringify(value);
    const set = {};
    for (const [key, value] of Object.entries(after)) {
        if (!Object.hasOwn(before, key) || text(before[key]) !== text(value)) {
            set[key] = value;
        }
    }
    return text({ set, unset: Object.keys(before).filter((key) => !Object.hasOwn(after, key)) });
}

/** Put what the editor holds into the form. What cannot be read goes as text, for the server to say where. */
function takeOver() {
    const patch = document.getElementById("id_data_patch");
    patch.value = "";
    if (content === null) {
        return;
    }
    if (content.json === undefined) {
        textarea.value = content.text;
        return;
    }
    textarea.value = LosslessJSON.stringify(content.json, undefined, 2);
    const before = read(document.getElementById("id_opened_data").value);
    if (isObject(before) && isObject(content.json)) {
        patch.value = patchOf(before, content.json);
    }
}

let create = null;

/** Fetch the editor and what it needs, once. */
async function load() {
    if (!create) {
        adoptStyles();
        const dark = { rel: "stylesheet", href: place.dataset.dark };
        document.head.append(Object.assign(document.createElement("link"), dark));
        await import(place.dataset.parser);
        create = (await import(place.dataset.editor)).createJSONEditor;
    }
    return create;
}

async function open() {
    button.disabled = true;
    try {
        mount(await load());
    } finally {
        button.disabled = false;
    }
}

function mount(createJSONEditor) {
    const target = document.createElement("div");
    target.className = `fsm-editor${isDark() ? " jse-theme-dark" : ""}`;
    place.append(target);
    editor = createJSONEditor({
        target,
        props: {
            content: { text: textarea.value },
            parser: LosslessJSON,
            mode: "tree",
            ariaLabel: place.dataset.label,
            onChange: (changed) => {
                content = changed;
            },
        },
    });
    textarea.hidden = true;
    button.textContent = place.dataset.close;
    button.setAttribute("aria-expanded", "true");
    editor.focus();
}

async function close() {
    takeOver();
    document.getElementById("id_data_patch").value = ""; // the text says it all
    content = null;
    await editor.destroy();
    editor = null;
    place.querySelector(".fsm-editor").remove();
    textarea.hidden = false;
    button.textContent = place.dataset.open;
    button.setAttribute("aria-expanded", "false");
    textarea.focus();
}

// In an object of JavaScript a key of this name would be lost: such data is for the text alone.
if (place && textarea && !textarea.value.includes("__proto__")) {
    place.hidden = false;
    button.addEventListener("click", () => (editor ? close() : open()));
    textarea.form.addEventListener("submit", takeOver);
}
