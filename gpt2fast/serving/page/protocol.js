// The server's protocol: JSON requests, and completions that stream as server-sent events.

/** An error object of the server, or the reason why there is none. */
export class ServerError extends Error {
  /**
   * @param {{message: string, type?: string, param?: string, code?: string}} error
   * @param {number} status of HTTP; 0 where nothing was answered.
   * @param {string | null} retryAfter seconds.
   */
  constructor(error, status, retryAfter = null) {
    super(error.message);
    Object.assign(this, { type: error.type, param: error.param, code: error.code, status, retryAfter });
  }
}

/** The response to a request; throws ServerError unless it is a success. */
export async function request(path, { body, key, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError({ message: "The server does not answer: is it still running?" }, 0);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status, statusText } = response;
  const error = await response.json().then((content) => content.error, () => null);
  const told = error?.message ? error : { message: `The server answered ${status} ${statusText}.` };
  return new ServerError(told, status, response.headers.get("Retry-After"));
}

/** Chunks of a streamed completion, as they come. */
export async function* completion(body, options) {
  const response = await request("v1/completions", { ...options, body: { ...body, stream: true } });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error, response.status);
    yield chunk;
  }
  throw new ServerError({ message: "The connection broke before the text was finished." }, 0);
}

/** The data of each server-sent event of a body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read().catch(broken);
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

function broken(error) {
  if (error.name === "AbortError") throw error;
  throw new ServerError({ message: "The connection broke before the text was finished." }, 0);
}
