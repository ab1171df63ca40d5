// The pictures that go with the next message: chosen, pasted or dropped, shown small, and told what can't be sent.
"use strict";

const LOSSLESS = ["image/png", "image/bmp", "image/gif"]; // keep every pixel, if they are small
const MAX_FILE_BYTES = 32 << 20;
const MAX_PIXELS = 64 << 20; // of a picture: decoded, each takes four bytes
const MAX_BODY_BYTES = 4 << 20; // of a whole request: the server refuses a longer one
const SMALL_BYTES = 256 << 10; // a larger picture is made smaller, which the model does too
const LONGEST_SIDE = 1024;
const TEXT_TOKENS = 64; // of the context that pictures leave to a short question and its answer

class Images {
  // tell: what is called with a text for the user. used: gives the data URLs of the conversation so far.
  constructor(tell, used) {
    this.tell = tell;
    this.used = used;
    this.chosen = []; // {name, url, note}
    this.most = 0; // pictures that fit the context; 0: the model takes none
    this.none = ""; // why it takes none
    this.reading = 0; // calls of `add` at work
    this.queue = Promise.resolve(); // their end
  }

  // What the chosen model takes: an entry of /v1/models.
  setModel(entry) {
    const tokens = (entry && entry.input_modalities.includes("image") && entry.image_tokens) || 0;
    this.most = tokens ? Math.max(0, Math.floor((entry.max_model_len - TEXT_TOKENS) / tokens)) : 0;
    this.none = tokens ? "An image and a question are longer than this model's context" : "This model takes no images";
    at("add-images").hidden = !this.most;
    if (!this.most) this.chosen = [];
    this.draw();
  }

  // Takes files, and says how many it took, and of each that it doesn't take, why. However often it is called, one
  // picture is decoded at a time.
  add(files) {
    if (!this.most) return this.tell(this.none);
    this.reading += 1;
    this.queue = this.queue.then(() => this.read(files)).finally(() => (this.reading -= 1));
    return this.queue;
  }

  async read(files) {
    const said = [];
    let added = 0;
    for (const file of files) {
      const picture = await readPicture(file).catch((error) => ({ wrong: error.message }));
      const wrong = picture.wrong || this.refusal(picture);
      if (wrong) {
        said.push(`${file.name || "The image"}: ${wrong}`);
      } else {
        this.chosen.push(picture);
        added += 1;
      }
    }
    this.draw();
    if (added) said.unshift(added === 1 ? "1 image added" : `${added} images added`);
    if (said.length) this.tell(said.join("; "));
  }

  // Why a further picture can't be sent; "": it can.
  refusal(picture) {
    if (!this.most) return this.none; // another model was chosen meanwhile
    const urls = [...this.used(), ...this.chosen.map((each) => each.url)];
    if (urls.length >= this.most) return `at most ${this.most} images fit this model's context, earlier ones included`;
    if (lengthOf([...urls, picture.url]) > (MAX_BODY_BYTES * 7) / 8) { // the rest is the conversation's text
      return "the images of a conversation are at most 3.5 MiB together; begin a new one";
    }
    return "";
  }

  remove(picture) {
    this.chosen = this.chosen.filter((each) => each !== picture);
    this.draw();
    this.tell(`${picture.name} removed`);
    (document.querySelector("#images button") || at("message")).focus();
  }

  // The chosen ones, which are then no longer chosen.
  take() {
    const taken = this.chosen;
    this.restore([]);
    return taken;
  }

  // Chooses these again.
  restore(pictures) {
    this.chosen = pictures;
    this.draw();
  }

  draw() {
    at("images").replaceChildren(
      ...this.chosen.map((picture) => {
        const item = document.createElement("li");
        const remove = document.createElement("button");
        remove.type = "button";
        remove.textContent = "Remove";
        remove.setAttribute("aria-label", `Remove ${picture.name}`);
        remove.addEventListener("click", () => this.remove(picture));
        item.append(thumbnail(picture), remove);
        return item;
      }),
    );
    at("images").hidden = at("images-note").hidden = !this.chosen.length;
    const urls = [...this.used(), ...this.chosen.map((each) => each.url)];
    const size = (lengthOf(urls) / (1 << 20)).toFixed(1);
    at("images-note").textContent = `${urls.length} of at most ${this.most} images in the conversation, ${size} of 3.5 MiB`;
  }
}

function thumbnail(picture) {
  const image = document.createElement("img");
  image.src = picture.url;
  image.alt = picture.name;
  image.title = `${picture.name}${picture.note}`;
  return image;
}

function lengthOf(urls) {
  return urls.reduce((sum, url) => sum + url.length, 0);
}

// A file as what is sent of it: written anew, which leaves out what a camera notes of time and place, and made smaller.
async function readPicture(file) {
  const name = file.name || "Image";
  if (!file.type.startsWith("image/")) throw new Error("isn't an image");
  if (file.size > MAX_FILE_BYTES) throw new Error("is larger than 32 MiB");
  const unread = new Error("can't be read as an image: JPEG, PNG, WebP, GIF and BMP can");
  const size = sizeOf(new DataView(await file.arrayBuffer().catch(() => Promise.reject(unread))));
  if (!size) throw unread;
  if (size[0] * size[1] > MAX_PIXELS) throw new Error(`has ${size[0]} x ${size[1]} pixels, and at most 64 Mi are read`);
  const bitmap = await createImageBitmap(file).catch(() => Promise.reject(unread)); // upright
  const { width, height } = bitmap;
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const isExact = scale === 1 && file.size <= SMALL_BYTES && LOSSLESS.includes(file.type);
  try {
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const sent = scale === 1 ? "" : `, sent as ${canvas.width} x ${canvas.height}`;
    const url = isExact ? canvas.toDataURL("image/png") : canvas.toDataURL("image/webp", 0.9); // PNG, if it has no WebP
    return { name, url, note: `, ${width} x ${height}${sent}` };
  } finally {
    bitmap.close();
  }
}

// [width, height] in pixels, from a file's header, so that nothing is decoded that would take gigabytes; null: it is
// none of the formats. https://www.w3.org/TR/png-3/#11IHDR, https://www.w3.org/Graphics/GIF/spec-gif89a.txt,
// https://developers.google.com/speed/webp/docs/riff_container, https://www.w3.org/Graphics/JPEG/itu-t81.pdf (B.2.2)
function sizeOf(view) {
  const text = (start, length) => {
    const bytes = new Uint8Array(view.buffer, view.byteOffset + start, length);
    return String.fromCharCode(...bytes);
  };
  const three = (start) => view.getUint16(start, true) + view.getUint8(start + 2) * 65536;
  try {
    if (text(0, 4) === "\x89PNG") return [view.getUint32(16), view.getUint32(20)];
    if (text(0, 4) === "GIF8") return [view.getUint16(6, true), view.getUint16(8, true)];
    if (text(0, 2) === "BM") {
      if (view.getUint32(14, true) === 12) return [view.getUint16(18, true), view.getUint16(20, true)];
      return [Math.abs(view.getInt32(18, true)), Math.abs(view.getInt32(22, true))];
    }
    if (text(0, 4) === "RIFF" && text(8, 4) === "WEBP") {
      const kind = text(12, 4);
      if (kind === "VP8X") return [1 + three(24), 1 + three(27)];
      if (kind === "VP8L") return [1 + (view.getUint16(21, true) & 0x3fff), 1 + ((view.getUint32(21, true) >> 14) & 0x3fff)];
      return [view.getUint16(26, true) & 0x3fff, view.getUint16(28, true) & 0x3fff];
    }
    return text(0, 2) === "\xff\xd8" ? sizeOfJpeg(view) : null;
  } catch (error) {
    if (error instanceof RangeError) return null; // it ends before
    throw error;
  }
}

// Goes from segment to segment to the frame's header, SOF0 to SOF15 without DHT, JPG and DAC.
function sizeOfJpeg(view) {
  for (let start = 2; ; ) {
    if (view.getUint8(start) !== 0xff) return null;
    const marker = view.getUint8(start + 1);
    if (marker === 0xff) {
      start += 1; // a byte that fills
    } else if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) {
      return [view.getUint16(start + 7), view.getUint16(start + 5)];
    } else {
      start += 2 + view.getUint16(start + 2);
    }
  }
}

// Whether a drag or a paste brings files, rather than text.
function hasFiles(transfer) {
  return Boolean(transfer) && [...transfer.types].includes("Files");
}
