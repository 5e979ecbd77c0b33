// Keeps what a page shows up to date. A websocket, or where there is none a small question to the server now and
// then, says that something has changed; then the page is fetched anew, as its reader may see it, and the parts
// named by the server are renewed in place. Nothing in which anybody types is touched.
"use strict";

(() => {
    const place = document.querySelector("[data-fsm-live]");
    if (!place) return;
    const { mark: firstMark, markUrl, parts, socket: path, alias, key } = place.dataset;
    const EVERY = Number(place.dataset.every) * 1000, HIDDEN_FACTOR = 6, TOLD_FACTOR = 6;
    const LONGEST = 120_000, RENEW = 60_000, SHORTEST_GAP = 300;
    const headers = { "X-FSM-Background": "1" };
    const reachesAll = "reachesAll" in place.dataset;
    let mark = firstMark, isLost = false, isConnected = false, failures = 0;

    function show(id) {
        const element = document.getElementById(id);
        if (element) element.hidden = false;
    }

    const REFUSED = new Error("not logged in any more, or not allowed");

    /** Fetch in the background. A redirect leads to the login page, or away from what is gone. */
    async function ask(url, more) {
        const response = await fetch(url, { headers: { ...headers, ...more }, redirect: "manual" });
        if (response.type === "opaqueredirect" || response.status === 403) throw REFUSED;
        if (!response.ok && response.status !== 304) throw new Error(`status ${response.status}`);
        return response;
    }

    function lose() {
        isLost = true;
        socket?.close();
        show(mark === "gone" ? "fsm-gone" : "fsm-lost");
    }

    // Renewing

    const isFace = (node) => node.nodeType === 1 && node.classList.contains("fsm-countdown"); // see countdown.js

    /** Make `old` like `fresh`, keeping the elements that are there: with the focus, the ticks and their listeners. */
    function renew(old, fresh) {
        for (const { name } of [...old.attributes]) {
            if (!fresh.hasAttribute(name)) old.removeAttribute(name);
        }
        for (const { name, value } of fresh.attributes) {
            if (old.getAttribute(name) !== value) old.setAttribute(name, value);
        }
        const there = [...old.childNodes].filter((node) => !isFace(node));
        const wanted = [...fresh.childNodes];
        wanted.forEach((node, at) => {
            const mine = there[at];
            if (!mine) old.append(document.importNode(node, true));
            else if (mine.nodeType !== node.nodeType || mine.nodeName !== node.nodeName) {
                mine.replaceWith(document.importNode(node, true));
            } else if (node.nodeType !== Node.ELEMENT_NODE) {
                if (mine.nodeValue !== node.nodeValue) mine.nodeValue = node.nodeValue;
            } else if (!mine.isEqualNode(node)) renew(mine, node);
        });
        there.slice(wanted.length).forEach((node) => node.remove());
    }

    /** Ticked rows must stay what they are until something is done with them. */
    const isSelecting = () => document.querySelector("#result_list input.action-select:checked") !== null;

    /** Where there was nothing at all, or there is nothing now, the page is another one. */
    function apply(page) {
        const fresh = [...page.querySelectorAll(parts)];
        const old = [...document.querySelectorAll(parts)];
        if (old.length === fresh.length) {
            old.forEach((element, at) => renew(element, fresh[at]));
            document.dispatchEvent(new CustomEvent("fsm:renewed"));
        } else if (!document.activeElement?.matches("input, select, textarea")) location.reload();
    }

    let isRenewing = false, isDue = false, nextAt = 0, timer = 0;

    /** Fetch the page and renew it: one at a time, and never so often that the server has nothing else to do. */
    function renewSoon() {
        isDue = true;
        if (isRenewing || isLost || document.hidden || isSelecting()) return;
        clearTimeout(timer);
        timer = setTimeout(renewNow, Math.max(0, nextAt - performance.now()));
    }

    async function renewNow() {
        if (isRenewing || isLost || isSelecting()) return;
        isRenewing = true;
        isDue = false;
        const start = performance.now();
        try {
            const response = await ask(location.href.split("#")[0]);
            const page = new DOMParser().parseFromString(await response.text(), "text/html");
            const { mark: newMark } = page.querySelector("[data-fsm-live]").dataset;
            if (!isSelecting()) apply(page);
            else isDue = true;
            if (newMark !== firstMark) show("fsm-moved");
            mark = newMark;
        } catch {
            failures += 1;
            mark = ""; // whatever it is at the next look, it is news
            lookLater();
        } finally {
            isRenewing = false;
            nextAt = performance.now() + Math.max(SHORTEST_GAP, 4 * (performance.now() - start));
            if (isDue) renewSoon();
        }
    }

    // Asking now and then; also beside a websocket, much less, because a hint may be lost

    function wait() {
        let factor = 2 ** Math.min(failures, 10);
        if (document.hidden) factor *= HIDDEN_FACTOR;
        else if (isConnected && reachesAll) factor *= TOLD_FACTOR;
        return Math.min(EVERY * factor, Math.max(LONGEST, EVERY));
    }

    let renewedAt = performance.now();

    async function look() {
        try {
            const response = await ask(markUrl, mark ? { "If-None-Match": `"${mark}"` } : {});
            failures = 0;
            if (response.status === 200) seen((await response.json()).mark);
            else if (performance.now() - renewedAt > RENEW) seen(mark); // times go on by themselves
        } catch (error) {
            if (error === REFUSED) lose();
            failures += 1;
        }
    }

    function seen(newMark) {
        renewedAt = performance.now();
        mark = newMark;
        if (newMark === "gone") {
            lose();
        } else renewSoon();
    }

    let looking = 0;

    function lookLater() {
        clearTimeout(looking);
        if (!isLost) looking = setTimeout(async () => { await look(); lookLater(); }, wait());
    }

    document.addEventListener("visibilitychange", async () => {
        if (document.hidden) return lookLater();
        if (isDue) renewSoon();
        if (!isLost) await look();
        return lookLater();
    });
    document.addEventListener("change", () => isDue && renewSoon()); // the last tick was taken away

    // Being told

    let socket = null, refusals = 0;

    function connect() {
        const address = new URL(path, location.href);
        address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
        socket = new WebSocket(address);
        socket.addEventListener("open", () => {
            isConnected = true;
            refusals = 0;
            socket.send(JSON.stringify({ type: "watch", alias, key }));
            look(); // for what happened between the page and now
        });
        socket.addEventListener("message", (event) => {
            const message = JSON.parse(event.data);
            if (message.type === "changed") renewSoon();
            if (message.type === "present") showPresent(message.names);
        });
        socket.addEventListener("close", () => {
            isConnected = false;
            showPresent([]);
            refusals += 1;
            lookLater();
            if (!isLost) setTimeout(connect, Math.min(1000 * 2 ** refusals, LONGEST) * (0.5 + Math.random()));
        });
    }

    function showPresent(names) {
        const chip = document.getElementById("fsm-present");
        if (!chip) return;
        chip.querySelector("b").textContent = names.join(", ");
        chip.hidden = names.length === 0;
    }

    // Django's script for the ticks knows the rows that were there at first; told a living list, it knows all.
    addEventListener("load", () => {
        const boxes = document.getElementById("changelist-form")?.getElementsByClassName("action-select");
        if (boxes?.length && typeof Actions === "function") {
            boxes.forEach = Array.prototype.forEach;
            Actions(boxes, { parent: boxes[0].form }); // Unfold's asks for the form
        }
    });

    if (path) connect();
    lookLater();
})();
