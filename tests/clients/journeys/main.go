// The journey with the Go client of openapi-generator.
package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"

	"example.org/proxy/arbiter"
)

func check(holds bool, what ...any) {
	if !holds {
		panic(fmt.Sprint(what...))
	}
}

func must[T any](value T, _ *http.Response, err error) T {
	check(err == nil, err)
	return value
}

func connect(url string) *arbiter.APIClient {
	configuration := arbiter.NewConfiguration()
	configuration.Servers = arbiter.ServerConfigurations{{URL: url}}
	return arbiter.NewAPIClient(configuration)
}

func denied(status int, response *http.Response, err error) arbiter.Problem {
	var failure *arbiter.GenericOpenAPIError
	check(errors.As(err, &failure), err)
	check(response.StatusCode == status, response.Status)
	problem, typed := failure.Model().(arbiter.Problem)
	check(typed, err)
	return problem
}

func main() {
	agent := os.Getenv("AGENT")
	client := connect(os.Getenv("ARBITER_URL"))
	as := func(token string) context.Context {
		return context.WithValue(context.Background(), arbiter.ContextAccessToken, token)
	}
	proxy, operator := as(os.Getenv("PROXY_TOKEN")), as(os.Getenv("OPERATOR_TOKEN"))
	sessions, admission, agents := client.SessionsAPI, client.AdmissionAPI, client.AgentsAPI

	grant := arbiter.NewCreateSession(agent, "journey", []string{"read_file", "fs.*"})
	session := must(sessions.CreateSession(proxy).CreateSession(*grant).Execute())
	check(session.CallBudget == 1000 && session.TimeLimitSecs == 1800)
	fmt.Println("create")
	it := session.SessionId
	check(must(sessions.GetSession(proxy, it).Execute()).Status == "active")
	fmt.Println("read")
	plain := arbiter.NewRecordCall("read_file")
	check(must(admission.RecordCall(proxy, it).RecordCall(*plain).Execute()).CallsMade == 1)
	fmt.Println("call")
	call := arbiter.NewRecordCall("fs.list")
	call.SetAgentId(agent)
	call.SetDataSensitivity(arbiter.INTERNAL)
	keyed := admission.RecordCall(proxy, it).RecordCall(*call).IdempotencyKey("step-1")
	first, answer, err := keyed.Execute()
	check(err == nil && first.CallsMade == 2, err)
	check(answer.Header.Get("Idempotency-Replayed") == "")
	again, answer, err := keyed.Execute()
	check(err == nil && again.CallsMade == 2, err)
	check(answer.Header.Get("Idempotency-Replayed") == "true")
	fmt.Println("repeat")
	ask := admission.RecordCall(proxy, it).RecordCall(*call)
	minimal, answer, err := ask.Prefer("return=minimal").Execute()
	check(err == nil && minimal == nil && answer.StatusCode == 204, err)
	fmt.Println("minimal")
	batch := arbiter.NewRecordBatch([]string{"fs.list", "fs.stat"})
	check(must(admission.RecordBatch(proxy, it).RecordBatch(*batch).Execute()).CallsMade == 5)
	fmt.Println("batch")
	check(must(ask.DryRun(true).Execute()).CallsMade == 6)
	check(must(sessions.GetSession(proxy, it).Execute()).CallsMade == 5)
	fmt.Println("dry run")
	wrong := arbiter.NewRecordCall("rm")
	_, answer, err = admission.RecordCall(proxy, it).RecordCall(*wrong).Execute()
	problem := denied(403, answer, err)
	check(problem.Code == "tool_not_authorized" && !problem.Retryable, problem)
	check(problem.NextAction == "use_authorized_tool", problem)
	check(problem.Violations[0].ToolIndexes[0] == 0, problem)
	fmt.Println("denied")
	grant.SetRateLimitPerMinute(1)
	slow := must(sessions.CreateSession(proxy).CreateSession(*grant).Execute()).SessionId
	must(admission.RecordCall(proxy, slow).RecordCall(*call).Execute())
	_, answer, err = admission.RecordCall(proxy, slow).RecordCall(*call).Execute()
	problem = denied(429, answer, err)
	check(problem.Code == "rate_limited" && problem.Retryable, problem)
	check(problem.GetRetryAfterSecs() >= 1, problem)
	fmt.Println("rate limited")
	active := sessions.ListSessions(operator).AgentId(agent).Status(arbiter.ACTIVE).Limit(1)
	page := must(active.Execute())
	rest := must(active.Cursor(page.GetNextCursor()).Execute())
	found := map[string]bool{page.Items[0].SessionId: true, rest.Items[0].SessionId: true}
	check(found[it] && found[slow] && !rest.HasNextCursor(), found)
	fmt.Println("list")
	check(must(agents.GetAgent(operator, agent).Execute()).ActiveSessions == 2)
	check(must(agents.CloseAgentSessions(operator, agent).Execute()).Closed == 2)
	fmt.Println("kill switch")
	_, answer, err = ask.Execute()
	check(denied(409, answer, err).Code == "session_closed")
	_, answer, err = sessions.GetSession(proxy, agent).Execute()
	check(denied(404, answer, err).Code == "session_not_found")
	fmt.Println("gone")
	future := connect(os.Getenv("FUTURE_URL"))
	later := must(future.SessionsAPI.GetSession(proxy, it).Execute())
	check(later.Status == "dreaming" && later.AdditionalProperties["colour"] == "blue", later)
	_, answer, err = future.AdmissionAPI.RecordCall(proxy, it).RecordCall(*call).Execute()
	problem = denied(403, answer, err)
	check(problem.Code == "wrong_moon" && problem.NextAction == "look_up", problem)
	check(problem.AdditionalProperties["moon"] == "full", problem)
	_, answer, err = future.AgentsAPI.GetAgent(proxy, agent).Execute()
	check(denied(451, answer, err).Code == "wrong_moon")
	fmt.Println("future")
}
