import java.util.List;
import java.util.Set;
import java.util.UUID;
import org.openapitools.client.ApiClient;
import org.openapitools.client.ApiException;
import org.openapitools.client.ApiResponse;
import org.openapitools.client.api.AdmissionApi;
import org.openapitools.client.api.AgentsApi;
import org.openapitools.client.api.SessionsApi;
import org.openapitools.client.model.CreateSession;
import org.openapitools.client.model.DataSensitivity;
import org.openapitools.client.model.Problem;
import org.openapitools.client.model.RecordBatch;
import org.openapitools.client.model.RecordCall;
import org.openapitools.client.model.Session;
import org.openapitools.client.model.SessionPage;
import org.openapitools.client.model.SessionStatus;

/** The journey with the Java client of openapi-generator, native: it sends Upgrade: h2c. */
public class Journey {
  static final UUID AGENT = UUID.fromString(env("AGENT"));

  interface Ask {
    void run() throws ApiException;
  }

  static String env(String name) {
    return System.getenv(name);
  }

  static ApiClient client(String url, String token) {
    ApiClient client = new ApiClient();
    client.updateBaseUri(url);
    client.setRequestInterceptor(request -> request.header("Authorization", "Bearer " + token));
    return client;
  }

  static void check(boolean holds, Object... what) {
    if (!holds) throw new AssertionError(List.of(what));
  }

  static Problem denied(int status, Ask ask) throws Exception {
    try {
      ask.run();
    } catch (ApiException error) {
      check(error.getCode() == status, error.getMessage());
      return ApiClient.createDefaultObjectMapper().readValue(error.getResponseBody(), Problem.class);
    }
    throw new AssertionError("not denied");
  }

  static CreateSession grant() {
    return new CreateSession()
        .agentId(AGENT)
        .declaredIntent("journey")
        .authorizedTools(List.of("read_file", "fs.*"));
  }

  public static void main(String[] arguments) throws Exception {
    ApiClient proxy = client(env("ARBITER_URL"), env("PROXY_TOKEN"));
    ApiClient operator = client(env("ARBITER_URL"), env("OPERATOR_TOKEN"));
    SessionsApi sessions = new SessionsApi(proxy), listing = new SessionsApi(operator);
    AdmissionApi admission = new AdmissionApi(proxy);
    AgentsApi agents = new AgentsApi(operator);

    Session session = sessions.createSession(grant(), null);
    check(session.getCallBudget() == 1000 && session.getTimeLimitSecs() == 1800, session);
    System.out.println("create");
    UUID it = session.getSessionId();
    check(sessions.getSession(it).getStatus().equals("active"));
    System.out.println("read");
    RecordCall plain = new RecordCall().toolName("read_file");
    check(admission.recordCall(it, plain, null, null, null).getCallsMade() == 1);
    System.out.println("call");
    RecordCall call =
        new RecordCall()
            .toolName("fs.list")
            .agentId(AGENT)
            .dataSensitivity(DataSensitivity.INTERNAL);
    ApiResponse<Session> first = admission.recordCallWithHttpInfo(it, call, null, "step-1", null);
    ApiResponse<Session> again = admission.recordCallWithHttpInfo(it, call, null, "step-1", null);
    check(first.getData().getCallsMade() == 2 && again.getData().getCallsMade() == 2);
    check(!first.getHeaders().containsKey("idempotency-replayed"));
    check(again.getHeaders().get("idempotency-replayed").equals(List.of("true")));
    System.out.println("repeat");
    ApiResponse<Session> minimal =
        admission.recordCallWithHttpInfo(it, call, null, null, "return=minimal");
    check(minimal.getStatusCode() == 204 && minimal.getData() == null);
    System.out.println("minimal");
    RecordBatch batch = new RecordBatch().toolNames(List.of("fs.list", "fs.stat"));
    check(admission.recordBatch(it, batch, null, null, null).getCallsMade() == 5);
    System.out.println("batch");
    check(admission.recordCall(it, call, true, null, null).getCallsMade() == 6);
    check(sessions.getSession(it).getCallsMade() == 5);
    System.out.println("dry run");
    RecordCall wrong = new RecordCall().toolName("rm");
    Problem problem = denied(403, () -> admission.recordCall(it, wrong, null, null, null));
    check(problem.getCode().equals("tool_not_authorized") && !problem.getRetryable(), problem);
    check(problem.getNextAction().equals("use_authorized_tool"), problem);
    check(problem.getViolations().get(0).getToolIndexes().equals(List.of(0)), problem);
    System.out.println("denied");
    UUID slow = sessions.createSession(grant().rateLimitPerMinute(1), null).getSessionId();
    admission.recordCall(slow, call, null, null, null);
    problem = denied(429, () -> admission.recordCall(slow, call, null, null, null));
    check(problem.getCode().equals("rate_limited") && problem.getRetryable(), problem);
    check(problem.getRetryAfterSecs() >= 1 && problem.getRetryAfterSecs() <= 60, problem);
    System.out.println("rate limited");
    SessionPage page = listing.listSessions(AGENT, SessionStatus.ACTIVE, 1, null, null, null, null);
    String cursor = page.getNextCursor();
    SessionPage rest = listing.listSessions(AGENT, SessionStatus.ACTIVE, 1, cursor, null, null, null);
    Set<UUID> found =
        Set.of(page.getItems().get(0).getSessionId(), rest.getItems().get(0).getSessionId());
    check(found.equals(Set.of(it, slow)) && rest.getNextCursor() == null, found);
    System.out.println("list");
    check(agents.getAgent(AGENT).getActiveSessions() == 2);
    check(agents.closeAgentSessions(AGENT).getClosed() == 2);
    System.out.println("kill switch");
    problem = denied(409, () -> admission.recordCall(it, call, null, null, null));
    check(problem.getCode().equals("session_closed"), problem);
    problem = denied(404, () -> sessions.getSession(UUID.randomUUID()));
    check(problem.getCode().equals("session_not_found"), problem);
    System.out.println("gone");
    ApiClient future = client(env("FUTURE_URL"), "any");
    Session later = new SessionsApi(future).getSession(it);
    check(later.getStatus().equals("dreaming"), later);
    check(later.getAdditionalProperty("colour").equals("blue"), later);
    AdmissionApi refusing = new AdmissionApi(future);
    problem = denied(403, () -> refusing.recordCall(it, call, null, null, null));
    check(problem.getCode().equals("wrong_moon"), problem);
    check(problem.getNextAction().equals("look_up"), problem);
    check(problem.getAdditionalProperty("moon").equals("full"), problem);
    problem = denied(451, () -> new AgentsApi(future).getAgent(AGENT));
    check(problem.getCode().equals("wrong_moon"), problem);
    System.out.println("future");
  }
}
