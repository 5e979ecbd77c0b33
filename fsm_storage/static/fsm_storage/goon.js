// Presses "Go on" while there is work left. Without this script people press it themselves.
"use strict";

document.querySelector("form[data-fsm-goon]")?.requestSubmit();
