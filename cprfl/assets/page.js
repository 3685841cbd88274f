'use strict'
// Explorers without a kernel. The page carries its numbers as JSON; each section draws one explorer from them.
// Sections share the image and the category, by name.

const page = JSON.parse(document.getElementById('numbers').textContent)
const sections = []
const shared = { image: null, category: null }

// ---- small tools

function make(tag, attributes = {}, ...children) {
  const svg = ['svg', 'path', 'circle', 'rect', 'text', 'line', 'g', 'polygon', 'title'].includes(tag)
  const node = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value)
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value)
  }
  node.append(...children.filter(child => child !== null && child !== undefined))
  return node
}

function bytes(text) { return Uint8Array.from(atob(text), letter => letter.charCodeAt(0)) }

function integers(text) { return new Int16Array(bytes(text).buffer) }

function best(values, k) { // indices of the k largest
  return Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b).slice(0, k)
}

const INFERNO = page.colours // 256 colours [r, g, b]

// ---- what all sections have in common

class Section {
  constructor(root, data) {
    this.root = root
    this.data = data
    this.labels = data.labels
    this.controls = make('div', { class: 'controls' })
    this.stage = make('div', { class: 'stage' })
    this.caption = make('div', { class: 'caption', 'aria-live': 'polite' })
    this.fields = {}
    root.replaceChildren(this.controls, this.stage, this.caption)
    root.addEventListener('pointerdown', () => activate(this))
    this.listenToSwipes()
  }

  add(label, control) {
    this.controls.append(label ? make('label', {}, label, control) : control)
    return control
  }

  choice(field, label, options, changed) { // options: [[value, text], ...]
    const control = make('select', { 'data-field': field, onchange: () => changed(control.value) })
    this.fields[field] = control
    this.setOptions(field, options)
    return this.add(label, control)
  }

  setOptions(field, options) {
    const control = this.fields[field], before = control.value
    control.replaceChildren(...options.map(([value, text]) => make('option', { value }, text)))
    if (options.some(([value]) => String(value) === before)) control.value = before
  }

  range(field, label, low, high, step, value, changed) {
    const control = make('input', { type: 'range', min: low, max: high, step, value, 'data-field': field,
                                    oninput: () => changed(Number(control.value)) })
    this.fields[field] = control
    return this.add(label, control)
  }

  button(text, action, attributes = {}) { return this.add('', make('button', { onclick: action, ...attributes }, text)) }

  listenToSwipes() {
    let start = null
    this.stage.addEventListener('touchstart', event => { start = event.touches[0] }, { passive: true })
    this.stage.addEventListener('touchend', event => {
      if (!start) return
      const end = event.changedTouches[0], across = end.clientX - start.clientX, down = end.clientY - start.clientY
      if (Math.abs(across) > 50 && Math.abs(across) > 2 * Math.abs(down)) this.step(across < 0 ? 1 : -1)
    })
  }

  follow() {} // the shared selection has changed
  key() {} // a key was pressed
}

function activate(section) {
  for (const other of sections) other.root.classList.toggle('active', other === section)
}

function share(from, selection) {
  Object.assign(shared, selection)
  for (const section of sections) if (section !== from) section.follow()
}

class Images extends Section { // browses images
  constructor(root, data) {
    super(root, data)
    this.image = 0
    this.filter = 'all'
  }

  addBrowsing(filters) {
    this.choice('images', 'Show', filters, value => { this.filter = value; this.show(this.order()[0] ?? this.image) })
    this.button('‹', () => this.step(-1), { 'aria-label': 'Previous image' })
    this.choice('image', 'Image', [], value => this.show(Number(value)))
    this.button('›', () => this.step(1), { 'aria-label': 'Next image' })
  }

  all() { return Array.from(this.data.images.keys()) }

  step(by) {
    const order = this.order()
    if (!order.length) return
    const at = order.indexOf(this.image)
    this.show(order[(at < 0 ? 0 : at + by + order.length) % order.length])
  }

  show(i) {
    this.image = i
    this.draw()
    share(this, { image: this.data.images[i].name })
  }

  follow() {
    const i = this.data.images.findIndex(image => image.name === shared.image)
    const c = this.data.classes.indexOf(shared.category)
    if (i >= 0) this.image = i
    if (c >= 0 && 'category' in this) this.category = c
    this.draw()
  }

  picture(i) { // a promise of the decoded image
    const image = this.data.images[i]
    image.decoded ??= new Promise(resolve => {
      const picture = new Image()
      picture.onload = () => resolve(picture)
      picture.src = `data:image/jpeg;base64,${image.jpeg}`
    })
    return image.decoded
  }

  syncImages() {
    const order = this.order()
    const shown = order.includes(this.image) ? order : [this.image, ...order]
    this.setOptions('image', shown.map(i => [i, `${i + 1}: ${this.data.images[i].name}`]))
    this.fields.image.value = this.image
  }

  truthText() {
    const { truth, unknown } = this.data.images[this.image]
    if (!truth) return ['labels not known']
    const names = truth.map(c => make('button', { 'data-category': c, onclick: () => this.pick(c) }, this.labels[c]))
    const parts = names.flatMap(name => [name, ' '])
    return ['shows ', ...(parts.length ? parts : ['none of the categories']),
            unknown.length ? `not known: ${unknown.map(c => this.labels[c]).join(', ')}` : '']
  }

  pick(category) { // a category's name was clicked
    share(null, { image: this.data.images[this.image].name, category: this.data.classes[category] })
  }
}

// ---- the best labels of several models

class PredictionSection extends Images {
  constructor(root, data) {
    super(root, data)
    this.k = data.k
    this.addBrowsing(data.filters.map(({ label }, i) => [i ? i : 'all', label]))
    this.range('k', 'Labels', 1, Math.min(10, this.labels.length), 1, this.k, k => { this.k = k; this.draw() })
    this.canvas = make('canvas', { role: 'img' })
    this.models = data.models.map(model => make('div', { class: 'model' }))
    this.stage.append(this.canvas, ...this.models)
    this.show(this.image)
  }

  order() { return this.filter === 'all' ? this.all() : this.data.filters[Number(this.filter)].images }

  key(key) {
    const k = Math.min(this.labels.length, Math.max(1, this.k + { '+': 1, '-': -1 }[key]))
    if (k) { this.k = k; this.fields.k.value = k; this.draw() }
  }

  async draw() {
    const i = this.image, image = this.data.images[i]
    this.syncImages()
    this.data.models.forEach((model, j) => this.models[j].replaceChildren(...this.listOf(model, image)))
    this.caption.replaceChildren(make('b', {}, image.name), ': ', ...this.truthText(), make('br'), make('small', {}, this.data.legend))
    const picture = await this.picture(i)
    if (i !== this.image) return
    const scale = Math.max(1, Math.floor(280 / Math.max(picture.width, picture.height)))
    this.canvas.width = picture.width * scale
    this.canvas.height = picture.height * scale
    this.canvas.setAttribute('aria-label', image.name)
    const context = this.canvas.getContext('2d')
    context.imageSmoothingEnabled = scale === 1
    context.drawImage(picture, 0, 0, this.canvas.width, this.canvas.height)
  }

  listOf(model, image) {
    const scores = model.scores[this.image], without = model.without && model.without[this.image]
    const lines = best(scores, this.k).map(c => {
      const right = !image.truth || image.unknown.includes(c) ? null : image.truth.includes(c)
      const mark = right === null ? '' : right ? '✓ ' : '✗ '
      const kind = right === null ? 'unknown' : right ? 'right' : 'wrong'
      const name = `${mark}${this.labels[c]}`
      return make('button', { class: 'score', 'data-category': c, onclick: () => this.pick(c) },
        make('span', {}, name, make('span', {}, scores[c].toFixed(2))),
        make('div', { class: 'bar' }, make('i', { class: kind, style: `width: ${100 * scores[c]}%` }),
          without ? make('b', { style: `left: ${100 * without[c]}%` }) : null))
    })
    return [make('h3', {}, model.title), ...lines]
  }
}

// ---- where a model looks

class AttentionSection extends Images {
  constructor(root, data) {
    super(root, data)
    this.model = 0
    this.method = data.models[0].heads ? 'mean' : 'gradcam'
    this.category = data.images[0].models[0].categories[0]
    this.opacity = 0.6
    this.addBrowsing([['all', 'all images'], ['category', 'with this category']])
    if (data.models.length > 1) {
      this.choice('model', 'Model', data.models.map((m, i) => [i, m.name]), v => { this.model = Number(v); this.draw() })
    }
    this.choice('category', 'Category', [], value => { this.category = Number(value); this.draw(); this.tell() })
    this.choice('method', 'Map', [], value => { this.method = value; this.draw() })
    this.range('opacity', 'Overlay', 0, 1, 0.05, this.opacity, value => { this.opacity = value; this.draw() })
    this.plain = make('canvas', { role: 'img' })
    this.over = make('canvas', { role: 'img', class: 'clickable', title: 'Click: which categories look here?',
                                 onclick: event => this.ask(event) })
    this.answer = make('div', { class: 'model' })
    this.stage.append(this.plain, this.over, this.answer)
    this.show(0)
  }

  tell() { share(this, { category: this.data.classes[this.category] }) }

  order() {
    if (this.filter === 'all') return this.all()
    return this.all().filter(i => (this.data.images[i].truth || []).includes(this.category))
  }

  stored() { return this.data.images[this.image].models[this.model] }

  methods() {
    const heads = this.data.models[this.model].heads
    const each = Array.from({ length: heads }, (_, h) => [`head ${h}`, `attention, head ${h + 1}`])
    const cam = this.stored().gradcam[this.category] ? [['gradcam', 'Grad-CAM']] : []
    return [...(heads ? [['mean', 'attention, mean'], ...each] : []), ...cam]
  }

  key(key) {
    const heads = this.data.models[this.model].heads
    if (key === '0' && heads) this.method = 'mean'
    else if (Number(key) >= 1 && Number(key) <= heads) this.method = `head ${Number(key) - 1}`
    else if (key === 'g') this.method = 'gradcam'
    else if (key === '[' || key === ']') {
      const all = this.stored().categories, at = all.indexOf(this.category)
      this.category = all[(at + (key === ']' ? 1 : -1) + all.length) % all.length]
      this.tell()
    } else return
    this.draw()
  }

  map(category = this.category, method = this.method) { // Float32Array on the patch grid, or null
    const stored = this.stored(), [h, w] = stored.grid, n = h * w, values = new Float32Array(n)
    if (method === 'gradcam') {
      const cam = stored.gradcam[category]
      if (!cam) return null
      cam.bytes ??= bytes(cam.map)
      return values.map((_, i) => cam.bytes[i] * cam.max / 255)
    }
    stored.bytes ??= bytes(stored.attention)
    const heads = this.data.models[this.model].heads, at = stored.categories.indexOf(category)
    if (at < 0) return null
    const chosen = method === 'mean' ? Array.from({ length: heads }, (_, i) => i) : [Number(method.slice(5))]
    const unit = stored.max[at] / 255 / chosen.length
    for (const head of chosen) {
      const start = (head * stored.categories.length + at) * n
      for (let i = 0; i < n; i++) values[i] += stored.bytes[start + i] * unit
    }
    return values
  }

  async draw() {
    const i = this.image, image = this.data.images[i], stored = this.stored()
    if (!stored.categories.includes(this.category)) this.category = stored.categories[0]
    const methods = this.methods()
    if (!methods.some(([value]) => value === this.method)) this.method = methods[0][0]
    this.syncImages()
    const truth = image.truth || []
    this.setOptions('category', stored.categories.map(c => [c, this.labels[c] + (truth.includes(c) ? ' ✓' : '')]))
    this.fields.category.value = this.category
    this.setOptions('method', methods)
    this.fields.method.value = this.method
    this.answer.replaceChildren()
    this.write(image, stored)
    const picture = await this.picture(i)
    if (i === this.image) this.paint(picture, stored.grid, this.map())
  }

  write(image, stored) {
    const at = stored.categories.indexOf(this.category)
    const there = !image.truth || image.truth.includes(this.category) ? '' : ' (not in this image)'
    const share = stored.on_patches ? `; ${Math.round(100 * stored.on_patches[at])} % of the attention is on patches` : ''
    const said = `: score ${stored.scores[at].toFixed(2)}, rank ${stored.ranks[at]} of ${this.labels.length}${share}`
    this.caption.replaceChildren(make('b', {}, image.name), ': ', ...this.truthText(), make('br'),
      make('b', {}, this.labels[this.category]), there, said, make('br'), make('small', {}, this.data.legend))
  }

  paint(picture, [h, w], values) {
    const scale = Math.max(0.1, 400 / Math.max(picture.width, picture.height))
    const width = Math.round(picture.width * scale), height = Math.round(picture.height * scale)
    for (const canvas of [this.plain, this.over]) {
      canvas.width = width
      canvas.height = height
      const context = canvas.getContext('2d')
      context.imageSmoothingEnabled = scale < 2
      context.drawImage(picture, 0, 0, width, height)
    }
    const context = this.over.getContext('2d'), max = Math.max(...values, 1e-12)
    context.globalAlpha = this.opacity
    values.forEach((value, i) => {
      const x = i % w, y = Math.floor(i / w)
      const [x0, x1] = [x, x + 1].map(v => Math.round(v * width / w))
      const [y0, y1] = [y, y + 1].map(v => Math.round(v * height / h))
      context.fillStyle = `rgb(${INFERNO[Math.round(255 * Math.max(0, value) / max)].join(' ')})`
      context.fillRect(x0, y0, x1 - x0, y1 - y0)
    })
    context.globalAlpha = 1
    for (const canvas of [this.plain, this.over]) this.frame(canvas.getContext('2d'), width, height)
    this.plain.setAttribute('aria-label', `the image and the boxes of ${this.labels[this.category]}`)
    this.over.setAttribute('aria-label', `${this.method} of ${this.labels[this.category]}, at most ${max.toPrecision(2)}`)
  }

  frame(context, width, height) {
    const boxes = (this.data.images[this.image].boxes || []).filter(box => box[0] === this.category)
    for (const [, x0, y0, x1, y1] of boxes) { // in shares of the image
      for (const [colour, line] of [['black', 5], ['white', 3]]) {
        context.strokeStyle = colour
        context.lineWidth = line
        context.strokeRect(x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)
      }
    }
  }

  ask(event) { // which categories look at the patch that was clicked?
    const [h, w] = this.stored().grid, at = this.over.getBoundingClientRect()
    const x = Math.min(w - 1, Math.floor(w * (event.clientX - at.left) / at.width))
    const y = Math.min(h - 1, Math.floor(h * (event.clientY - at.top) / at.height))
    const shares = this.stored().categories.map(c => [c, this.map(c)]).filter(([, map]) => map).map(([c, map]) => {
      const sum = map.reduce((a, b) => a + b, 0)
      return [c, sum ? map[y * w + x] / sum : 0]
    })
    const found = shares.sort((a, b) => b[1] - a[1]).slice(0, 6)
    const lines = found.map(([c, share]) => make('button', { class: 'score', 'data-category': c, onclick: () => this.pick(c) },
      make('span', {}, this.labels[c], make('span', {}, `${(100 * share).toFixed(1)} %`)),
      make('div', { class: 'bar' }, make('i', { class: 'right', style: `width: ${100 * share}%` }))))
    this.answer.replaceChildren(make('h3', {}, `Share of each map on patch ${y + 1}, ${x + 1}`), ...lines)
  }
}

// ---- how the prompts move

class DriftSection extends Section {
  constructor(root, data) {
    super(root, data)
    this.run = 0
    this.epoch = data.runs[0].epochs.length - 1
    this.category = 0
    this.centre = false
    if (data.runs.length > 1) {
      this.choice('run', 'Run', data.runs.map((r, i) => [i, r.name]), v => { this.run = Number(v); this.setEpoch(Infinity) })
    }
    this.play = this.button('▶', () => this.film(), { 'aria-label': 'Play' })
    this.range('epoch', 'Epoch', 0, this.epoch, 1, this.epoch, value => this.setEpoch(value))
    this.choice('category', 'Category', this.labels.map((label, c) => [c, label]), value => {
      this.category = Number(value)
      this.draw()
      share(this, { category: data.classes[this.category] })
    })
    this.toggle = this.button('Without their mean', () => this.turn(), { 'aria-pressed': 'false' })
    this.paths = make('svg', { viewBox: '0 0 560 420', width: 560, role: 'img' })
    this.bars = make('svg', { viewBox: '0 0 400 420', width: 400, role: 'img' })
    this.stage.append(this.paths, this.bars)
    this.draw()
  }

  follow() {
    const c = this.data.classes.indexOf(shared.category)
    if (c >= 0) { this.category = c; this.draw() }
  }

  turn() {
    this.centre = !this.centre
    this.toggle.setAttribute('aria-pressed', this.centre)
    this.draw()
  }

  setEpoch(value) {
    const last = this.data.runs[this.run].epochs.length - 1
    this.epoch = Math.max(0, Math.min(last, value))
    this.fields.epoch.max = last
    this.fields.epoch.value = this.epoch
    this.draw()
  }

  step(by) { this.setEpoch(this.epoch + by) }

  key(key) {
    const n = this.labels.length
    if (key === ' ') this.film()
    if (key === 'm') this.turn()
    if (key === '[' || key === ']') {
      this.category = (this.category + (key === ']' ? 1 : -1) + n) % n
      this.draw()
      share(this, { category: this.data.classes[this.category] })
    }
  }

  film() {
    if (this.playing) { clearInterval(this.playing); this.playing = null } else {
      if (this.epoch === this.data.runs[this.run].epochs.length - 1) this.setEpoch(0)
      this.playing = setInterval(() => {
        this.step(1)
        if (this.epoch === this.data.runs[this.run].epochs.length - 1) this.film()
      }, 350)
    }
    this.play.textContent = this.playing ? '❚❚' : '▶'
    this.play.setAttribute('aria-label', this.playing ? 'Pause' : 'Play')
  }

  draw() {
    const run = this.data.runs[this.run], name = this.labels[this.category], epoch = run.epochs[this.epoch]
    this.fields.category.value = this.category
    this.drawPaths(run, epoch)
    this.drawNeighbours(run)
    const { cosine, moved } = run.drift[this.epoch]
    this.caption.replaceChildren(make('b', {}, name), ` at epoch ${epoch} of ${run.epochs.at(-1)}: cosine with its own start `,
      `${cosine[this.category].toFixed(2)}, moved by ${moved[this.category].toFixed(2)} of its length`, make('br'),
      make('small', {}, `Left: places of the prompts on the two axes of a PCA, ${run.explained}. Right: cosines with the nearest `,
        `prompts, a bar for now and ◇ for the start. ${this.data.legend}`))
  }

  drawPaths(run, epoch) {
    const n = this.labels.length, E = run.epochs.length, all = run.xy.flat()
    const spread = axis => {
      const values = all.map(point => point[axis]), low = Math.min(...values), high = Math.max(...values)
      return [low - 0.06 * (high - low) - 1e-9, high + 0.12 * (high - low) + 1e-9]
    }
    const [[x0, x1], [y0, y1]] = [spread(0), spread(1)]
    const place = ([x, y]) => [20 + 520 * (x - x0) / (x1 - x0), 400 - 370 * (y - y0) / (y1 - y0)]
    const path = c => 'M' + run.xy.slice(0, this.epoch + 1).map(at => place(at[c]).map(v => v.toFixed(1)).join(' ')).join('L')
    const others = Array.from({ length: n }, (_, c) => make('path', { d: path(c), fill: 'none', stroke: 'var(--faint)' }))
    const points = Array.from({ length: n }, (_, c) => this.point(place(run.xy[this.epoch][c]), c))
    const [x, y] = place(run.xy[this.epoch][this.category])
    const chosen = make('path', { d: path(this.category), fill: 'none', stroke: 'var(--text)', 'stroke-width': 2 })
    const ring = make('circle', { cx: x, cy: y, r: 10, fill: 'none', stroke: 'var(--text)', 'stroke-width': 2 })
    const left = x > 380
    const label = make('text', { x: x + (left ? -14 : 14), y: y + 4, 'text-anchor': left ? 'end' : 'start',
                                 'font-weight': 'bold' }, this.labels[this.category])
    this.paths.replaceChildren(...others, ...points, chosen, ring, label)
    this.paths.setAttribute('aria-label', `prompts at epoch ${epoch}, ${E} epochs`)
  }

  point([x, y], c) {
    const { colour, marker } = this.data.styles[c]
    const act = { 'data-category': c, style: 'cursor: pointer', fill: colour,
                  onclick: () => { share(null, { category: this.data.classes[c] }) } }
    const name = make('title', {}, this.labels[c])
    if (marker === 's') return make('rect', { x: x - 5, y: y - 5, width: 10, height: 10, ...act }, name)
    if (marker === '^') return make('polygon', { points: `${x},${y - 6} ${x - 6},${y + 5} ${x + 6},${y + 5}`, ...act }, name)
    return make('circle', { cx: x, cy: y, r: 5, ...act }, name)
  }

  drawNeighbours(run) {
    const n = this.labels.length, values = run[this.centre ? 'centred' : 'cosines']
    run.decoded ??= {}
    const table = run.decoded[this.centre] ??= integers(values)
    const row = (e, c) => Array.from(table.subarray((e * n + c) * n, (e * n + c + 1) * n), v => v / 32767)
    const now = row(this.epoch, this.category), start = row(0, this.category)
    const near = best(now, n).filter(c => c !== this.category).slice(0, this.data.k)
    const low = Math.min(0, ...near.flatMap(c => [now[c], start[c]])), x = v => 150 + 200 * (v - low) / (1 - low)
    const lines = near.flatMap((c, i) => {
      const y = 30 + 56 * i, from = Math.min(x(0), x(now[c])), at = x(start[c])
      return [
        make('text', { x: 142, y: y + 18, 'text-anchor': 'end' }, this.labels[c].slice(0, 20)),
        make('rect', { x: from, y: y + 2, width: Math.abs(x(now[c]) - x(0)), height: 22, fill: this.data.styles[c].colour,
                       'data-category': c, style: 'cursor: pointer', stroke: 'var(--text)', 'stroke-width': 0.5,
                       onclick: () => share(null, { category: this.data.classes[c] }) }),
        make('polygon', { points: `${at},${y + 5} ${at + 7},${y + 13} ${at},${y + 21} ${at - 7},${y + 13}`, fill: 'var(--paper)',
                          stroke: 'var(--text)' }),
        make('text', { x: 362, y: y + 18 }, now[c].toFixed(2)),
      ]
    })
    this.bars.replaceChildren(...lines)
    this.bars.setAttribute('aria-label', `nearest prompts of ${this.labels[this.category]}`)
  }
}

// ---- start

const KINDS = { predictions: PredictionSection, attention: AttentionSection, drift: DriftSection }

document.querySelectorAll('.living').forEach((root, i) => sections.push(new KINDS[page.parts[i].kind](root, page.parts[i])))
if (sections.length) activate(sections[0])

document.addEventListener('keydown', event => {
  const { tagName } = event.target // a control keeps the keys that it needs itself
  if (event.ctrlKey || event.metaKey || event.altKey || tagName === 'SELECT') return
  if (tagName === 'INPUT' && event.key.startsWith('Arrow')) return
  const section = sections.find(each => each.root.classList.contains('active'))
  if (!section) return
  if (event.key === ' ' && !(section.film && tagName === 'BODY')) return // it presses buttons, opens details, scrolls
  if (event.key === 'ArrowLeft') section.step(-1)
  else if (event.key === 'ArrowRight') section.step(1)
  else if (/^[0-9g\[\]+\- m]$/.test(event.key)) section.key(event.key)
  else return
  event.preventDefault()
})
