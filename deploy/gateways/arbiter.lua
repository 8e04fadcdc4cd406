-- http-request lua.arbiter URL KEY: asks Arbiter whether the request may pass. Only a 200 lets it
-- through; every other answer, and none, ends here.

-- What Arbiter reads of a request. All values of a header are sent: it refuses those that come twice.
local ASKED = {
  "authorization",
  "x-arbiter-session",
  "x-arbiter-tool",
  "mcp-protocol-version",
  "mcp-method",
  "mcp-name",
  "x-request-id",
}

-- What a client may see of a denial.
local SHOWN = {
  "content-type",
  "retry-after",
  "ratelimit",
  "ratelimit-policy",
  "x-should-retry",
  "x-request-id",
  "cache-control",
}

-- HAProxy 2.6 asks up to four times, so that a service that hangs is given up after four of these.
local TIMEOUT_MILLISECONDS = 1000

local UNAVAILABLE = '{"title":"Not checked","status":503,'
  .. '"agent_message":"The call could not be checked right now; try again in a moment."}'

local function question(txn, key)
  local sent = txn.http:req_get_headers()
  local headers = {
    ["content-length"] = { "0" },
    ["x-arbiter-key"] = { key },
    -- The repeated requests have the same key, and are charged once.
    ["x-arbiter-idempotency-key"] = { txn.f:uuid() },
  }
  for _, name in ipairs(ASKED) do
    if sent[name] then
      headers[name] = {}
      for _, value in pairs(sent[name]) do
        table.insert(headers[name], value)
      end
    end
  end
  return headers
end

core.register_action("arbiter", { "http-req" }, function(txn, url, key)
  local asked, answer = pcall(function()
    return core.httpclient():post({
      url = url,
      headers = question(txn, key),
      timeout = TIMEOUT_MILLISECONDS,
    })
  end)
  local status = asked and answer and answer.status or 0
  if status == 200 then
    local rate = answer.headers["ratelimit"]
    if rate then
      txn:set_var("txn.arbiter_rate", rate[0])
    end
    return
  end
  local reply = txn:reply({ status = 503 })
  -- HAProxy itself makes 504 of a timeout, without headers.
  if status >= 400 and answer.headers and answer.headers["content-type"] then
    reply:set_status(status)
    for _, name in ipairs(SHOWN) do
      if answer.headers[name] then
        reply:add_header(name, answer.headers[name][0])
      end
    end
    reply:set_body(answer.body)
  else
    reply:add_header("content-type", "application/problem+json")
    reply:set_body(UNAVAILABLE)
  end
  txn:done(reply)
end, 2)
