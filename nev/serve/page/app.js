// The page of `nev serve`. The address holds the query without its picture; `go` changes it, `show` shows it.
// Texts of an index are anyone's texts: they reach the document as text, never as markup.

const $ = (id) => document.getElementById(id);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const PAGE = 24; // hits
const CUTS = [0, 50, 80, 90, 95, 98, 99, 99.5, 99.9]; // percentiles
// What the address says beside words and uid, the default first.
const CHOICES = {
	show: ["together", "apart", "image", "text"],
	view: ["list", "map"],
	calibrated: ["1", "0"],
	hybrid: ["0", "1"],
	cut: CUTS.map(String),
};
const NOUNS = { image: ["picture", "pictures"], text: ["text", "texts"] };
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// An element: "p.words" is a <p class="words">. Children are elements, texts, or null.
function make(what, properties, ...children) {
	const [tag, className = ""] = what.split(".");
	const node = Object.assign(document.createElement(tag), { className }, properties);
	node.append(...children.filter((child) => child !== null));
	return node;
}
const button = (words, onclick, properties) => make("button", { type: "button", onclick, ...properties }, words);
const mark = (kind) => make("span", { className: `mark ${kind}` });
const isChord = (event) => event.ctrlKey || event.metaKey || event.altKey;
const count = (number, kind) => `${number.toLocaleString("en")} ${NOUNS[kind][number === 1 ? 0 : 1]}`;
const nameOf = (item) => item.text || item.source || item.uid;

// The state, the address and the history

let info = null;
let state = readAddress();
let picture = null; // {url, name}, a data URL: in memory alone
const entries = new Map(); // what each entry of the history showed: the back button asks nothing again
const items = new Map(); // by uid
const lists = () => entry().lists ?? [];
const hits = () => lists().flatMap((list) => list.hits);
const isCalibrated = () => state.calibrated === "1" && info.calibration;
const hasQuery = () => Boolean(state.q || state.uid || picture);

function entry() {
	const key = history.state?.key;
	if (!entries.has(key)) entries.set(key, {});
	return entries.get(key);
}

function readAddress() {
	const query = new URLSearchParams(location.search);
	const read = ([name, values]) => [name, values.includes(query.get(name)) ? query.get(name) : values[0]];
	return { q: query.get("q") ?? "", uid: query.get("uid") ?? "", ...Object.fromEntries(Object.entries(CHOICES).map(read)) };
}

function addressOf(state) {
	const parts = Object.entries(state).filter(([name, value]) => value !== (CHOICES[name]?.[0] ?? ""));
	return location.pathname + (parts.length ? `?${new URLSearchParams(parts)}` : "");
}

function go(change, newPicture = picture) {
	const next = { ...state, ...change };
	const isSame = (a) => newPicture === picture && addressOf(a) === addressOf(next);
	const isOtherView = !isSame(state) && isSame({ ...state, view: next.view });
	const way = isSame(state) ? "replaceState" : "pushState";
	const known = isOtherView ? entry().lists : null;
	remember();
	[state, picture] = [next, newPicture];
	history[way]({ key: performance.timeOrigin + performance.now(), picture: Boolean(picture) }, "", addressOf(state));
	Object.assign(entry(), { picture, lists: known });
	show();
}

function findLike(item) {
	items.set(item.uid, item);
	go({ q: "", uid: item.uid }, null);
}

function remember() {
	entry().scroll = scrollY;
}

// The service

const token = () => sessionStorage.getItem("nev-token") ?? "";
let dialog = null;

function askToken() {
	dialog ??= new Promise((resolve) => {
		$("refused").textContent = token() ? "The service refused this token." : "";
		$("secret").value = $("token").returnValue = "";
		$("token").onclose = () => {
			dialog = null;
			const secret = $("token").returnValue && $("secret").value.trim();
			if (secret) sessionStorage.setItem("nev-token", secret);
			resolve(Boolean(secret));
		};
		$("token").showModal();
	});
	return dialog;
}

async function call(address, content, signal) {
	for (let tries = 0; ; ) {
		const used = token();
		const headers = { ...(used && { Authorization: `Bearer ${used}` }), ...(content && { "Content-Type": "application/json" }) };
		const body = content && JSON.stringify(content);
		const answer = await fetch(address, { method: body ? "POST" : "GET", headers, body, signal }).catch((error) => {
			throw signal?.aborted ? error : new Error("The service cannot be reached. Does nev serve still run?");
		});
		if (answer.ok) return answer;
		if (answer.status === 401) {
			if (used === token() && !(await askToken())) throw new Error("This service asks for a token.");
		} else if (answer.status === 429 && tries++ < 4) {
			const seconds = Math.min(Number(answer.headers.get("Retry-After")) || 1, 60);
			if (signal) announce(`The service is busy. Next try in ${seconds} s.`);
			await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
			signal?.throwIfAborted();
		} else {
			const { error } = await answer.json().catch(() => ({}));
			throw new Error(error?.message ?? `The service answered ${answer.status} ${answer.statusText}`);
		}
	}
}

// An <img> sends no token: with a token its picture is fetched, and shown from memory.
function thumbnail(uid, properties) {
	const image = make("img", { alt: "", draggable: false, ...properties });
	const address = `thumbnails/${encodeURIComponent(uid)}`;
	if (items.get(uid)?.thumbnail === false) return image;
	if (!token()) image.src = address;
	else {
		image.onload = () => URL.revokeObjectURL(image.src);
		call(address)
			.then((answer) => answer.blob())
			.then((blob) => (image.src = URL.createObjectURL(blob)))
			.catch(() => (image.alt = "No thumbnail"));
	}
	return image;
}

// Search

let running = new AbortController();

// Without an index: sentences beside a picture.
async function compare(signal) {
	const sentences = state.q.split(/\s*;\s*/).filter(Boolean);
	if (!picture || !sentences.length) throw new Error("Choose a picture, and type sentences with ; between them.");
	const input = [{ image: picture.url }, ...sentences.map((text) => ({ text }))];
	const { data } = await (await call("v1/embeddings", { model: info.model, input }, signal)).json();
	const cosine = (n) => data[n + 1].embedding.reduce((sum, number, i) => sum + number * data[0].embedding[i], 0);
	const hits = sentences.map((text, n) => ({ uid: text, kind: "text", text, score: cosine(n) }));
	return { kind: "text", hits: hits.sort((a, b) => b.score - a.score), complete: true };
}

async function ask(kind, offset, signal) {
	if (!info.index) return compare(signal);
	const answer = await call(
		"search",
		{
			text: state.q || null,
			image: picture?.url ?? null,
			uid: state.uid || null,
			top: PAGE,
			offset,
			kind,
			min_percentile: Number(state.cut) || null,
			calibrated: isCalibrated(),
			hybrid: state.hybrid === "1" && Boolean(state.q && info.index.hybrid),
		},
		signal,
	);
	const { hits, query } = await answer.json();
	for (const hit of hits) items.set(hit.uid, hit);
	return { kind, hits, query, complete: hits.length < PAGE };
}

const kinds = () => ({ together: [null], apart: ["image", "text"] })[state.show] ?? [state.show];

// Runs a request, the only one at a time; shows that it runs, and why it failed.
async function attend(task, again) {
	running.abort();
	const { signal } = (running = new AbortController());
	document.body.classList.add("busy");
	refuse("");
	try {
		await task(signal);
	} catch (error) {
		if (signal.aborted) return;
		refuse(error.message, again);
		if (!lists()[0]) $("lists").replaceChildren();
	}
	if (!signal.aborted) document.body.classList.remove("busy");
}

const run = () =>
	attend(async (signal) => {
		announce("Searching …");
		entry().lists = await Promise.all(kinds().map((kind) => ask(kind, 0, signal)));
		showLists();
	}, run);

const more = (list, place, again) =>
	attend(async (signal) => {
		const { hits, complete } = await ask(list.kind, list.hits.length, signal);
		list.hits.push(...hits);
		again.hidden = list.complete = complete;
		const cards = hits.map(makeCard);
		place.append(...cards);
		cards[0]?.querySelector(".similar").focus({ preventScroll: true });
		sumUp();
	});

// What is seen

function announce(words) {
	$("summary").textContent = words;
}

function refuse(words, again) {
	$("notice").hidden = !words;
	$("notice").replaceChildren(words, ...(again ? [button("Try again", again)] : []));
	if (words) announce("");
}

function inWords({ kind, percentile }) {
	if (percentile == null) return NOUNS[kind][0];
	const above = 100 - percentile;
	if (above < 0.05) return `top of the ${NOUNS[kind][1]}`;
	return `top ${above < 1 ? above.toFixed(1) : Math.ceil(above)} % of ${NOUNS[kind][1]}`;
}

function makeCard(item) {
	const { uid, kind, score, source } = item;
	const name = nameOf(item);
	const like = () => findLike(item);
	const similar = button("More like this", like, { className: "similar", tabIndex: -1 });
	similar.ariaLabel = `More like this: ${name.slice(0, 120)}`;
	similar.onfocus = () => (rove(similar), select(uid));
	return make(
		"li",
		{ className: `hit ${kind}`, onmouseenter: () => select(uid) },
		kind === "image" ? thumbnail(uid, { alt: item.text ? "" : name, loading: "lazy", onclick: like }) : null,
		name.length > 240
			? make("details.words", {}, make("summary", {}, `${name.slice(0, 180)} … `), `… ${name.slice(180)}`)
			: make("p.words", {}, name),
		make("p.facts", {}, mark(kind), inWords(item), make("span.score", { title: "Cosine" }, score?.toFixed(3) ?? "")),
		source && source !== name ? make("p.source", { title: source }, source) : null,
		similar,
	);
}

function showLists() {
	$("lists").classList.toggle("apart", lists().length > 1);
	$("lists").replaceChildren(
		...lists().map((list) => {
			const place = make("ol", { className: list.kind }, ...list.hits.map(makeCard));
			const title = NOUNS[list.kind]?.[1] ?? "hits";
			const again = button(`More ${title}`, () => more(list, place, again), { className: "more", hidden: list.complete });
			return make("section", {}, lists().length > 1 ? make("h2", {}, title) : null, place, again);
		}),
	);
	sumUp();
}

function sumUp() {
	const list = hits();
	const parts = Object.keys(NOUNS).map((kind) => count(list.filter((hit) => hit.kind === kind).length, kind));
	const range = lists().every((list) => list.complete) ? "All" : "The first";
	if (list.length) announce(`${range} ${list.length} hit${list[1] ? "s" : ""}: ${parts.join(" and ")}`);
	else announce(state.cut === "0" ? "No hit." : "No hit. The cut-off may be too high.");
	$("hint").hidden = !list.length || isCalibrated() || state.show !== "together" || !info.calibration;
	$("cut").disabled = list.length > 0 && list.every((hit) => hit.percentile == null);
	if ($("cut").disabled) $("cut-words").textContent = "all (too few items)";
	rove();
	showChip();
	drawMap(true);
}

// The picture or the item of the query, beside the words.
function showChip() {
	const { uid } = state;
	$("chip").hidden = !picture && !uid;
	if ($("chip").hidden) return;
	const item = items.get(uid) ?? { uid, kind: lists()[0]?.query?.kind };
	const name = picture?.name ?? `Like ${nameOf(item)}`;
	let image = mark("text");
	if (picture) image = make("img", { src: picture.url, alt: "" });
	else if (item.kind === "image") image = thumbnail(uid);
	const away = button("×", () => (go({ uid: "" }, null), $("words").focus()), { ariaLabel: "Remove", className: "quiet" });
	$("chip").replaceChildren(image, make("span", { title: name }, name), away);
}

function show() {
	const { q, uid, view, cut } = state;
	document.title = `${q || (uid ? "More like this" : picture ? "A picture" : "Search")} · nev`;
	document.body.dataset.view = view;
	$("words").value = q;
	for (const radio of all("[name=show]")) radio.checked = radio.value === state.show;
	for (const name of ["calibrated", "hybrid"]) $(name).checked = state[name] === "1";
	$("calibrated").parentElement.hidden = !info.calibration;
	$("hybrid").parentElement.hidden = !info.index?.hybrid;
	$("cut").value = CUTS.indexOf(Number(cut));
	showCut();
	for (const link of $("views").children) {
		link.href = addressOf({ ...state, view: link.dataset.view });
		link.ariaCurrent = link.dataset.view === view ? "page" : null;
	}
	$("map").hidden = view !== "map";
	running.abort();
	document.body.classList.remove("busy");
	refuse("");
	const isNew = hasQuery() && !entry().lists;
	document.body.classList.toggle("blank", !hasQuery() && view === "list");
	if (isNew) showChip(), run();
	else showLists();
	if (!hasQuery()) {
		const lost = "A link holds no picture: choose it again.";
		announce(history.state?.picture ? lost : "Type words, or drop, paste or choose a picture.");
	}
	scrollTo(0, entry().scroll ?? (isNew ? 0 : scrollY));
	openMap();
}

function showCut() {
	const cut = CUTS[$("cut").value];
	$("cut-words").textContent = $("cut").ariaValueText = cut ? `the top ${Number((100 - cut).toFixed(1))} %` : "all";
}

// Pictures

const readUrl = (file) =>
	new Promise((resolve, reject) => {
		const reader = new FileReader();
		Object.assign(reader, { onload: () => resolve(reader.result), onerror: () => reject(reader.error) });
		reader.readAsDataURL(file);
	});

// Large files, and forms that the service may not know, are drawn anew. A model sees a few hundred pixels.
async function redraw(file) {
	const image = await createImageBitmap(file).catch(() => {
		throw new Error(`This browser cannot read ${file.name}.`);
	});
	const share = Math.min(1, 1600 / Math.max(image.width, image.height));
	const [width, height] = [image.width, image.height].map((side) => Math.max(1, Math.round(share * side)));
	const canvas = make("canvas", { width, height });
	canvas.getContext("2d").drawImage(image, 0, 0, width, height);
	return canvas.toDataURL("image/webp", 0.95);
}

async function take(files) {
	const file = [...files].find((file) => file.type.startsWith("image/"));
	if (!file) return refuse(files[0] ? `${files[0].name} is no picture.` : "A link is no picture: save it, and drop the file.");
	try {
		const isPlain = /jpeg|png|webp|gif/.test(file.type) && file.size < 2e6;
		const url = await (isPlain ? readUrl : redraw)(file);
		go({ uid: "", q: $("words").value.trim() }, { url, name: file.name });
	} catch (error) {
		refuse(error.message);
	}
}

const isFile = ({ dataTransfer: { types } }) => types.includes("Files") || types.includes("text/uri-list");
const showDrop = (is) => document.body.classList.toggle("drop", is);
addEventListener("dragover", (event) => {
	if (!isFile(event)) return;
	event.preventDefault();
	showDrop(true);
});
addEventListener("dragleave", (event) => event.relatedTarget || showDrop(false));
addEventListener("drop", (event) => {
	showDrop(false);
	if (!isFile(event)) return;
	event.preventDefault();
	take(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
	const { clipboardData } = event;
	// Office programs put a picture beside each text that they copy.
	if (!clipboardData.files.length || clipboardData.getData("text/plain")) return;
	event.preventDefault();
	take(clipboardData.files);
});

// Keys

const buttons = (within = $("lists")) => all(".similar", within);

// One hit is a stop of the Tab key: the hit that had the focus last, else the first.
function rove(current = buttons().find((node) => !node.tabIndex) ?? buttons()[0]) {
	if ($("lists").contains(current)) for (const node of buttons()) node.tabIndex = node === current ? 0 : -1;
}

// The hit that a key leads to. Up and down stay in a list; up from the first row leads to the words.
function neighbour(from, key) {
	if (key === "Home" || key === "End") return buttons().at(key === "Home" ? 0 : -1);
	if (!MOVES[key]) return null;
	const [dx, dy] = MOVES[key];
	if (dx) return buttons()[buttons().indexOf(from) + dx] ?? from;
	const list = buttons(from.closest("ol"));
	const top = (node) => node.parentElement.offsetTop;
	const columns = list.filter((node) => top(node) === top(list[0])).length;
	return list[list.indexOf(from) + dy * columns] ?? (dy < 0 ? $("words") : from);
}

addEventListener("keydown", (event) => {
	const { key, target } = event;
	if (!info || $("token").open || isChord(event)) return;
	let next = null;
	if (key === "/" && !target.matches("[type=search]")) next = $("words");
	else if (key === "ArrowDown" && target === $("words")) next = buttons()[0];
	else if (target.matches("#lists .similar")) next = neighbour(target, key);
	else if (key === "Escape" && select(null)) return;
	if (key === "Escape") {
		next = $("words");
		next.value = "";
		if (hasQuery()) go({ q: "", uid: "" }, null);
	}
	if (!next) return;
	event.preventDefault();
	next.focus();
});

// The map

const canvas = $("canvas");
const brush = canvas.getContext("2d");
const SHAPES = {
	image: new Path2D("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z"),
	text: new Path2D("M0-5 5 0 0 5-5 0z"),
	query: new Path2D("M0-13 3-4 13-4 5 2 8 12 0 6-8 12-5 2-13-4-3-4z"),
};
const maps = {}; // by calibration
let plane = null; // of `maps`: {uids, kinds, texts, explained, points, scale}
let points = new Map(); // by uid: {uid, kind, text, at, rank}
let view = { k: 1, x: 0, y: 0 };
let selected = null; // uid

const middle = () => [canvas.clientWidth / 2, canvas.clientHeight / 2];

async function openMap() {
	if (state.view !== "map") return;
	const wanted = isCalibrated();
	try {
		maps[wanted] ??= scaleMap(await (await call(`map?calibrated=${wanted}`)).json());
	} catch (error) {
		return refuse(error.message, openMap);
	}
	if (wanted !== isCalibrated()) return;
	const [before, after] = [plane, maps[wanted]];
	const start = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : performance.now();
	// The eye follows the points from their places without calibration to those with it.
	const step = (now) => {
		if (maps[isCalibrated()] !== after) return;
		const t = before ? Math.min((now - start) / 700, 1) : 1;
		const mix = (a, b) => a + (b - a) * t * t * (3 - 2 * t);
		const place = ([x, y], n) => [mix(before.points[n][0], x), mix(before.points[n][1], y)];
		plane = t < 1 ? { ...after, points: after.points.map(place) } : after;
		drawMap(t === 1);
		if (t < 1) requestAnimationFrame(step);
	};
	step(before === after ? Infinity : performance.now());
}

// Places in a box of 1 by 1 / 1.6, for hits and queries, too.
function scaleMap(raw) {
	const ends = [0, 1].map((axis) => {
		const sorted = raw.points.map((point) => point[axis]).sort((a, b) => a - b);
		return [sorted[0], sorted.at(-1)];
	});
	const [x, y] = ends.map(([low, high]) => (low + high) / 2);
	const [width, height] = ends.map(([low, high]) => high - low);
	const size = Math.max(width, 1.6 * height) || 1;
	const scale = (place) => [(place[0] - x) / size, (y - place[1]) / size];
	return { ...raw, scale, points: raw.points.map(scale) };
}

function toPixels(at) {
	const [x, y] = middle();
	const scale = view.k * Math.min(2 * x - 60, 1.6 * (2 * y - 60));
	return [x + view.x + at[0] * scale, y + view.y + at[1] * scale];
}

// The sample, and above it the hits, the best on top.
function gather() {
	const { uids, kinds, texts } = plane;
	points = new Map(uids.map((uid, n) => [uid, { uid, kind: kinds[n], text: texts[n], at: plane.points[n] }]));
	for (const [n, hit] of [...hits().entries()].reverse()) {
		const at = points.get(hit.uid)?.at ?? (hit.position && plane.scale(hit.position));
		points.delete(hit.uid);
		if (at) points.set(hit.uid, { ...hit, at, rank: n + 1 });
	}
}

// isNew: other points or hits than before, so that the legend and the table change, too.
function drawMap(isNew) {
	if (!plane || !canvas.clientWidth) return;
	gather();
	if (isNew) showLegend();
	paint();
	showPoint();
	if (isNew && $("table").open) showTable();
}

function paint() {
	const colourOf = (node) => getComputedStyle(node).backgroundColor;
	const ground = colourOf(canvas);
	const ink = getComputedStyle(canvas).color;
	const colours = Object.fromEntries(all("#legend .mark").map((node) => [node.classList[1], colourOf(node)]));
	const stamp = (shape, [x, y], size, rim) => {
		brush.save();
		brush.translate(x, y);
		brush.scale(size, size);
		if (rim) brush.stroke(SHAPES[shape]);
		brush.fillStyle = colours[shape] ?? ink;
		brush.fill(SHAPES[shape]);
		brush.restore();
	};
	canvas.width = canvas.clientWidth * devicePixelRatio;
	canvas.height = canvas.clientHeight * devicePixelRatio;
	brush.scale(devicePixelRatio, devicePixelRatio);
	const query = lists()[0]?.query?.position;
	const star = query && toPixels(plane.scale(query));
	const lit = [...points.values()].filter((point) => point.rank);
	const size = Math.min(Math.sqrt(view.k), 2) * (points.size > 800 ? 0.8 : 1);
	for (const { kind, at, rank } of points.values()) {
		const place = toPixels(at);
		if (star && rank < 13) {
			Object.assign(brush, { strokeStyle: ink, globalAlpha: 0.3, lineWidth: 1 });
			brush.stroke(new Path2D(`M${star}L${place}`));
		}
		Object.assign(brush, { strokeStyle: ground, globalAlpha: rank || !lit.length ? 1 : 0.3, lineWidth: 3 });
		stamp(kind, place, rank ? 1.7 * size : size, rank);
	}
	brush.globalAlpha = 1;
	if (star) {
		stamp("query", star, 1, true);
		const words = (state.q || (picture ? "your picture" : "this item")).slice(0, 30);
		Object.assign(brush, { font: "600 14px system-ui", textAlign: "center", lineWidth: 4, fillStyle: ink });
		const half = brush.measureText(words).width / 2 + 6;
		const left = Math.max(half, Math.min(star[0], canvas.clientWidth - half));
		const top = star[1] + (star[1] < 50 ? 30 : -20);
		brush.strokeText(words, left, top);
		brush.fillText(words, left, top);
	}
	const chosen = points.has(selected) ? toPixels(points.get(selected).at) : null;
	if (chosen) {
		Object.assign(brush, { strokeStyle: ink, lineWidth: 2 });
		brush.beginPath();
		brush.arc(...chosen, 7 * size + 6, 0, 7);
		brush.stroke();
	}
	canvas.ariaLabel = `Map of ${points.size} pictures and texts, ${lit.length} of ${hits().length} hits lit`;
	canvas.dataset.state = JSON.stringify({ lit: lit.map(({ uid }) => uid), star, selected, chosen, ...view }); // for tests
}

function showLegend() {
	const share = Math.round(100 * (plane.explained[0] + plane.explained[1]));
	const number = (kind) => plane.kinds.filter((other) => other === kind).length;
	$("legend").replaceChildren(
		...Object.keys(NOUNS).map((kind) => make("span", {}, mark(kind), count(number(kind), kind))),
		`★ the query. These two directions hold ${share} % of the differences.`,
	);
}

// Returns whether another point is selected than before.
function select(uid) {
	if (!plane || selected === uid) return false;
	selected = uid;
	drawMap();
	return true;
}

// The card of the selected point, beside it.
function showPoint() {
	const [card, item] = [$("point"), points.get(selected)];
	card.hidden = !item;
	if (!item) return;
	if (card.uid !== selected || card.score !== item.score) card.replaceChildren(makeCard(item));
	Object.assign(card, { uid: selected, score: item.score });
	const [x, y] = toPixels(item.at);
	const left = x < middle()[0] ? x + 20 : x - 20 - card.offsetWidth;
	const bottom = canvas.clientHeight - card.offsetHeight - 8;
	card.style.left = `${Math.max(8, left)}px`;
	card.style.top = `${Math.max(8, Math.min(y - card.offsetHeight / 2, bottom))}px`;
}

function showTable() {
	const rows = [...points.values()].reverse().map((item) => {
		const like = button(nameOf(item).slice(0, 120), () => findLike(item), { className: "link" });
		like.onfocus = () => select(item.uid);
		const cells = [item.rank ?? "", NOUNS[item.kind][0], like];
		return make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
	});
	const head = make("tr", {}, ...["Hit", "Kind", "Item"].map((title) => make("th", { scope: "col" }, title)));
	$("table").lastElementChild.replaceChildren(make("table", {}, head, ...rows));
}

// The uid of the point under the pointer.
function nearby({ offsetX, offsetY }) {
	let [best, least] = [null, 20];
	for (const { uid, at, rank } of points.values()) {
		const [x, y] = toPixels(at);
		const distance = Math.hypot(x - offsetX, y - offsetY) - (rank ? 4 : 0);
		if (distance < least) [best, least] = [uid, distance];
	}
	return best;
}

function zoom(factor, at = middle()) {
	const k = Math.min(Math.max(view.k * factor, 1), 40);
	const [x, y] = middle().map((half, n) => {
		const from = at[n] - half;
		return k > 1 ? from - ((from - view["xy"[n]]) * k) / view.k : 0;
	});
	view = { k, x, y };
	drawMap();
}

function pan(dx, dy) {
	view.x += dx;
	view.y += dy;
	drawMap();
}

const fingers = new Map();
let moved = 0; // pixels, since the first finger came down
canvas.onpointerdown = (event) => {
	canvas.setPointerCapture(event.pointerId);
	moved = fingers.size ? 9 : 0;
	fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
};
canvas.onpointermove = (event) => {
	const [before, now] = [fingers.get(event.pointerId), [event.offsetX, event.offsetY]];
	if (!before) return select(nearby(event));
	const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
	const span = (place) => Math.hypot(place[0] - other[0], place[1] - other[1]) || 1;
	const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
	moved += Math.hypot(dx, dy);
	fingers.set(event.pointerId, now);
	if (other) zoom(span(now) / span(before), other);
	else if (moved > 4) pan(dx, dy);
};
canvas.onpointerup = canvas.onpointercancel = (event) => {
	fingers.delete(event.pointerId);
	if (moved > 4 || event.type !== "pointerup") return;
	// A mouse selects before it clicks; a finger selects with the first touch.
	const uid = nearby(event);
	if (!select(uid) && uid) findLike(points.get(uid));
};
canvas.onpointerleave = (event) => event.pointerType === "mouse" && select(null);
canvas.onwheel = (event) => {
	if (view.k === 1 && event.deltaY > 0) return; // the page scrolls
	event.preventDefault();
	zoom(Math.exp(-event.deltaY / 500), [event.offsetX, event.offsetY]);
};
canvas.onkeydown = (event) => {
	const { key } = event;
	const move = MOVES[key];
	if (!plane || isChord(event)) return;
	if (move) pan(-60 * move[0], -60 * move[1]);
	else if ("+=-0".includes(key)) zoom({ "-": 0.67, 0: 0 }[key] ?? 1.5);
	else return;
	event.preventDefault();
};
for (const node of all(".zoom button")) node.onclick = () => zoom(Number(node.value));
$("table").ontoggle = () => drawMap(true);
new ResizeObserver(() => drawMap()).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").onchange = () => drawMap();

// The start

$("search").onsubmit = (event) => {
	event.preventDefault();
	go({ q: $("words").value.trim() });
};
for (const radio of all("[name=show]")) radio.onchange = () => go({ show: radio.value });
for (const name of ["calibrated", "hybrid"]) $(name).onchange = () => go({ [name]: String(Number($(name).checked)) });
$("cut").oninput = showCut;
$("cut").onchange = () => go({ cut: String(CUTS[$("cut").value]) });
for (const link of $("views").children) {
	link.onclick = (event) => {
		if (isChord(event) || event.shiftKey) return;
		event.preventDefault();
		go({ view: link.dataset.view });
	};
}
all(".skip")[0].onclick = (event) => (event.preventDefault(), $("results").focus());
for (const node of all(".choose")) node.onclick = () => $("file").click();
$("file").onchange = () => take($("file").files);
$("file").onclick = () => ($("file").value = "");

history.scrollRestoration = "manual";
addEventListener("scrollend", remember);
addEventListener("popstate", () => {
	state = readAddress();
	picture = entry().picture ?? null;
	if (info) show();
});

const start = () =>
	attend(async () => {
		info = await (await call("info")).json();
		const { index, model } = info;
		$("about").textContent = index ? `${model} · ${count(index.images, "image")}, ${count(index.texts, "text")}` : model;
		$("search").hidden = false;
		$("views").hidden = $("options").hidden = !index;
		$("no-index").hidden = Boolean(index);
		history.replaceState({ ...history.state, key: performance.timeOrigin }, "");
		show();
		if (!hasQuery()) $("words").focus();
	}, start);

start();
